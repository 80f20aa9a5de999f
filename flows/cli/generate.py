"""`svd generate text|image|interpolate|multiview`: options to requests. The work is in svd.tasks.api."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.generate_models import check_parts, fetched
from flows.cli.generate_options import Dtype, Motion, Networks, Ramp, Results, Size, Solving, with_options
from flows.cli.generate_results import Writer, check_single, describe, groups, seeded
from flows.places import OUTPUTS
from svd.config import Phase, Preset, Sampling
from svd.config.load import load_preset
from svd.core.errors import UserError

if TYPE_CHECKING:
    from svd.diffusion.edm import Kind
    from svd.tasks.api import Models

generate_app = typer.Typer(help="Generate clips with trained or released models.", no_args_is_help=True)

DEFAULT_FPS = 7.0
KINDS: dict[str, Kind] = {"edm": "edm-v", "discrete-v": "v", "discrete-eps": "eps"}

GuidanceOption = Annotated[
    float | None, typer.Option(min=0, help="Guidance scale; 1 switches it off.", show_default="the preset's")
]
GuidanceMin = Annotated[float, typer.Option(min=0, help="Guidance at the first frame, or at both ends of a triangle.")]
GuidanceMax = Annotated[
    float | None, typer.Option(min=0, help="At the last frame, or in the middle.", show_default="the preset's")
]
RampOption = Annotated[Ramp, typer.Option(help="How guidance changes over the frames (D.4.1).")]
CoverOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Pixels; the video is scaled to cover them and cropped.", show_default="the video's shape"
    ),
]
CondAug = Annotated[float, typer.Option(min=0, help="Noise on what is given: more noise, freer motion.")]


@generate_app.command()
@with_options
def text(
    networks: Networks,
    solving: Solving,
    motion: Motion,
    size: Size,
    results: Results,
    prompts: Annotated[list[str] | None, typer.Argument(help="What to show; one clip for each.")] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", "-f", help="Text file, one prompt a line.")] = None,
    motion_prompt: Annotated[str | None, typer.Option(help="Other text for the temporal layers: 'panning'.")] = None,
    guidance: GuidanceOption = None,
) -> None:
    """Clips from text. Example: svd generate text "a red ball bouncing" --seed 3 --out ball.mp4."""
    from svd.media.images import read_prompts
    from svd.tasks.api import text_to_video

    wanted = list(prompts or []) + (read_prompts(prompts_file) if prompts_file else [])
    if not wanted:
        raise UserError("no prompt: write one behind the command, or give a file with --prompts")
    jobs = seeded(wanted, results)
    networks = fetched(networks, "text_encoder")
    preset = load_preset(networks.preset)
    sampling = solving.sampling(preset.evaluation.ucf101.sampling, guidance)
    phase, fps = preset.high_quality_finetuning.phases[-1], motion.fps or DEFAULT_FPS
    frames, height, width = clip_size(networks, size, phase)
    networks = located(networks, preset, "high-quality-finetuning")
    models = open_models(networks, preset, "high-quality-finetuning", phase)
    details = describe("text-to-video", networks, sampling, results, motion=motion.motion, fps=fps,
                       frames=frames, height=height, width=width)  # fmt: skip
    writer = Writer(results, details)
    for group in groups(jobs, results.batch):
        clips = text_to_video(
            models,
            [prompt for prompt, _ in group],
            frames=frames,
            height=height,
            width=width,
            fps=fps,
            motion_bucket=motion.motion,
            sampling=sampling,
            seed=[seed for _, seed in group],
            motion_prompt=motion_prompt,
        )
        for clip, (prompt, seed) in zip(clips, group, strict=True):
            writer.save(clip, fps, prompt, seed, prompt=prompt, motion_prompt=motion_prompt or prompt)


@generate_app.command()
@with_options
def image(
    networks: Networks,
    solving: Solving,
    motion: Motion,
    size: Size,
    results: Results,
    pictures: Annotated[list[Path], typer.Argument(help="Pictures; one clip for each, beginning with it.")],
    guidance_min: GuidanceMin = 1.0,
    guidance_max: GuidanceMax = None,
    ramp: RampOption = "linear",
    cond_aug: CondAug = 0.02,
) -> None:
    """Clips that begin with a picture. Example: svd generate image photo.jpg -m
    stabilityai/stable-video-diffusion-img2vid-xt.
    """
    from svd.media.images import read_pictures
    from svd.tasks.api import image_to_video

    jobs = seeded(pictures, results)
    networks = fetched(networks, "image_encoder")
    preset = load_preset(networks.preset)
    sampling = solving.sampling(base_sampling(networks, preset.evaluation.multiview.sampling), guidance_max)
    phase, fps = preset.image_to_video.phases[-1], motion.fps or DEFAULT_FPS
    frames, height, width = clip_size(networks, size, phase)
    read_pictures(pictures, (height, width))  # a broken picture is named before minutes go into loading and sampling
    networks = located(networks, preset, "image-to-video")
    models = open_models(networks, preset, "image-to-video", phase)
    details = describe("image-to-video", networks, sampling, results, motion=motion.motion, fps=fps,
                       frames=frames, height=height, width=width, cond_aug=cond_aug,
                       guidance_min=guidance_min, guidance_max=sampling.guidance, ramp=ramp)  # fmt: skip
    writer = Writer(results, details)
    for group in groups(jobs, results.batch):
        clips = image_to_video(
            models,
            read_pictures([path for path, _ in group], (height, width)),
            frames=frames,
            height=height,
            width=width,
            fps=fps,
            motion_bucket=motion.motion,
            sampling=sampling,
            seed=[seed for _, seed in group],
            cond_aug=cond_aug,
            guidance_range=(guidance_min, sampling.guidance),
            ramp=ramp,
        )
        for clip, (path, seed) in zip(clips, group, strict=True):
            writer.save(clip, fps, path.stem, seed, picture=path.name)


@generate_app.command()
@with_options
def interpolate(
    networks: Networks,
    solving: Solving,
    motion: Motion,
    results: Results,
    video: Annotated[Path, typer.Argument(help="Video, GIF, or folder of PNGs.")],
    rounds: Annotated[int, typer.Option(min=1, max=4, help="Each round multiplies the frame rate by 4.")] = 1,
    height: CoverOption = None,
    width: CoverOption = None,
    guidance: GuidanceOption = None,
    cond_aug: CondAug = 0.02,
) -> None:
    """Three new frames between any two: 28 frames become 109. --fps is the rate of VIDEO when its file doesn't say."""
    from svd.media.images import read_clip
    from svd.media.resize import cover
    from svd.tasks.api import interpolate as interpolated

    preset = load_preset(networks.preset)
    clip, rate = read_clip(video)
    check_single(results.out, results.count)
    networks = fetched(networks, "image_encoder")
    sampling = solving.sampling(base_sampling(networks, preset.evaluation.multiview.sampling), guidance)
    networks, fps = located(networks, preset, "frame-interpolation"), motion.fps or rate
    models = open_models(networks, preset, "frame-interpolation", preset.frame_interpolation.phases[-1])
    height, width = covered_size(height, width, (clip.shape[-2], clip.shape[-1]), models.multiple)
    clip = cover(clip, height, width)
    details = describe("interpolation", networks, sampling, results, motion=motion.motion, fps=fps, cond_aug=cond_aug,
                       height=height, width=width, rounds=rounds)  # fmt: skip
    writer = Writer(results, details)
    for _, seed in seeded([video], results):
        longer = interpolated(models, clip, fps=fps, motion_bucket=motion.motion, sampling=sampling, seed=seed,
                              rounds=rounds, cond_aug=cond_aug, windows_at_once=max(4, results.batch))  # fmt: skip
        writer.save(longer, fps * 4**rounds, video.stem, seed, video=video.name)


@generate_app.command()
@with_options
def multiview(
    networks: Networks,
    solving: Solving,
    motion: Motion,
    results: Results,
    pictures: Annotated[list[Path], typer.Argument(help="Pictures of an object on white or transparent ground.")],
    elevation: Annotated[float, typer.Option(min=-90, max=90, help="Of the camera in the picture, degrees.")] = 0.0,
    views: Annotated[int | None, typer.Option(min=1, help="Views.", show_default="as the preset trains")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="as the preset trains")] = None,
    guidance_min: GuidanceMin = 1.0,
    guidance_max: GuidanceMax = None,
    ramp: RampOption = "triangle",
    cond_aug: CondAug = 0.02,
) -> None:
    """Orbits around an object; the last view is the given one. Example: svd generate multiview cup.png --elevation
    10.
    """
    from svd.media.images import read_pictures
    from svd.tasks.api import multiview as orbits

    jobs = seeded(pictures, results)
    networks = fetched(networks, "image_encoder")
    preset = load_preset(networks.preset)
    phase = preset.multiview_finetuning.phases[-1]
    side, count = size or phase.height, views or phase.frames
    read_pictures(pictures, (side, side))
    sampling = solving.sampling(base_sampling(networks, preset.evaluation.multiview.sampling), guidance_max)
    networks, fps = located(networks, preset, "multiview-finetuning"), motion.fps or DEFAULT_FPS
    models = open_models(networks, preset, "multiview-finetuning", phase)
    guidance_range = guidance_min, max(guidance_min, sampling.guidance)
    details = describe("multi-view", networks, sampling, results, motion=motion.motion, fps=fps, elevation=elevation,
                       views=count, size=side, cond_aug=cond_aug,
                       guidance_min=guidance_min, guidance_max=guidance_range[1], ramp=ramp)  # fmt: skip
    writer = Writer(results, details)
    for group in groups(jobs, results.batch):
        clips = orbits(
            models,
            read_pictures([path for path, _ in group], (side, side)),
            elevation,
            count,
            sampling=sampling,
            seed=[seed for _, seed in group],
            fps=fps,
            motion_bucket=motion.motion,
            cond_aug=cond_aug,
            guidance_range=guidance_range,
            ramp=ramp,
        )
        for clip, (path, seed) in zip(clips, group, strict=True):
            writer.save(clip, fps, path.stem, seed, picture=path.name)


def located(networks: Networks, preset: Preset, stage: str) -> Networks:
    """The options with everything said that they leave open: without `--model` what the preset's stage `stage` has
    made, where the other networks are, device, type, and a scale for every LoRA.

    Raises UserError for a model without U-Net, and for a released one without what no option gives instead.
    """
    from svd.model.formats.folders import ENCODERS, bundled

    root, model = OUTPUTS / preset.name, networks.model
    check_parts(networks)
    device, dtype = _device_and_dtype(networks)
    return dataclasses.replace(
        networks,
        model=model or root / stage / "unet",
        autoencoder=networks.autoencoder or bundled(model, "vae") or root / "autoencoder",
        encoders=networks.encoders or bundled(model, *ENCODERS) or root / "encoders",
        lora=[f"{folder}:{scale}" for folder, scale in _lora_scales(networks.lora or [])] or None,
        device=device,
        dtype=dtype,
    )


def open_models(networks: Networks, preset: Preset, stage: str, phase: Phase) -> Models:
    """The networks of options that are `located`; `phase` is the last one of the preset's stage.

    Raises UserError when there is no such model, and for everything that svd.tasks.api.load_models refuses.
    """
    import torch

    from svd.model.formats.folders import is_released
    from svd.tasks.api import load_models

    model, autoencoder, encoders = networks.model, networks.autoencoder, networks.encoders
    assert model is not None and autoencoder is not None and encoders is not None
    if not model.exists():
        raise UserError(f"{model}: no such model; run `svd stage {stage} -p {networks.preset}`, or give --model")
    models = load_models(
        model,
        autoencoder,
        encoders,
        preset.encoders,
        networks.device,
        dtype=getattr(torch, networks.dtype),
        offload=networks.offload,
        kind=KINDS[networks.objective],
    )
    _apply_loras(models, networks.lora or [])
    if networks.compile:
        models.unet.compile_blocks()
    if is_released(model) or model == OUTPUTS / preset.name / stage / "unet":
        frames, *size = clip_size(networks, Size(), phase)
        models = dataclasses.replace(models, trained_frames=frames, trained_size=(size[0], size[1]))
    return dataclasses.replace(
        models,
        passes="sequential" if networks.sequential else "auto",
        decode_chunk=networks.decode_chunk,
        decode_overlap=networks.decode_overlap,
    )


def _device_and_dtype(networks: Networks) -> tuple[str, Dtype]:
    device = networks.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if networks.dtype != "auto":
        return device, networks.dtype
    return device, "float32" if device == "cpu" else "bfloat16"


def _apply_loras(models: Models, values: list[str]) -> None:
    from svd.model.lora import load_lora, set_scales

    scales = {}
    for folder, scale in _lora_scales(values):
        name = re.sub(r"\W", "_", folder)
        if name in scales:
            raise UserError(f"--lora {folder} is given twice; give it once with the sum of the scales")
        load_lora(models.unet, Path(folder), name)
        scales[name] = scale
    if scales:
        set_scales(models.unet, scales)
        weight = next(models.unet.parameters())
        models.unet.to(weight.device, weight.dtype)


def _lora_scales(values: list[str]) -> Iterator[tuple[str, float]]:
    for value in values:
        folder, colon, scale = value.rpartition(":")
        if not colon or Path(value).exists():
            yield value, 1.0
            continue
        try:
            yield folder, float(scale)
        except ValueError:
            raise UserError(f"--lora {value}: '{scale}' is no number; write FOLDER or FOLDER:SCALE") from None


def clip_size(networks: Networks, size: Size, phase: Phase) -> tuple[int, int, int]:
    """Frames, height and width: the options', or what the preset trains last, or what a released model was trained
    at.
    """
    from svd.model.formats.folders import is_released, published_clip

    model = networks.model
    released = model is not None and is_released(model)
    known = published_clip(model) if model and released else (phase.frames, phase.height, phase.width)
    return size.frames or known[0], size.height or known[1], size.width or known[2]


def base_sampling(networks: Networks, preset: Sampling) -> Sampling:
    """The preset's sampling, or for a released model the settings that it is published with."""
    from svd.model.formats.folders import is_released

    released = networks.model is not None and is_released(networks.model)
    return Sampling(steps=25, guidance=3.0) if released else preset


def covered_size(height: int | None, width: int | None, given: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width as asked for; one that isn't keeps the shape of `given`, rounded to `multiple`."""
    if height is None and width is None:
        return given
    if height is None:
        height = max(1, round(given[0] * (width or 0) / given[1] / multiple)) * multiple
    if width is None:
        width = max(1, round(given[1] * height / given[0] / multiple)) * multiple
    return height, width
