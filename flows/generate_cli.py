"""`svd generate text|image|interpolate|multiview`: options to requests, clips to files. The work is in svd.generate."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from flows.generate_options import Motion, Networks, Ramp, Results, Size, Solving, with_options
from flows.runner import OUTPUTS
from svd.config import EncodersConfig, Phase, Preset, Sampling
from svd.presets import load_preset
from svd.stage import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from svd.diffusion.edm import Kind
    from svd.generate import Models
    from svd.safety import SafetyFilter

generate_app = typer.Typer(help="Generate clips with trained or released models.", no_args_is_help=True)

DEFAULT_FPS = 7.0
KINDS: dict[str, Kind] = {"edm": "edm-v", "discrete-v": "v", "discrete-eps": "eps"}
Item = TypeVar("Item")

GuidanceOption = Annotated[
    float | None, typer.Option(min=0, help="Guidance scale; 1 switches it off.", show_default="the preset's")
]
GuidanceMin = Annotated[float, typer.Option(min=0, help="Guidance at the first frame, or at both ends of a triangle.")]
GuidanceMax = Annotated[
    float | None, typer.Option(min=0, help="At the last frame, or in the middle.", show_default="the preset's")
]
RampOption = Annotated[Ramp, typer.Option(help="How guidance changes over the frames (D.4.1).")]
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
    from svd.files import read_prompts
    from svd.generate import text_to_video

    wanted = list(prompts or []) + (read_prompts(prompts_file) if prompts_file else [])
    if not wanted:
        raise UserError("no prompt: write one behind the command, or give a file with --prompts")
    jobs = seeded(wanted, results)
    preset = load_preset(networks.preset)
    sampling = solving.sampling(preset.evaluation.ucf101.sampling, guidance)
    frames, height, width = clip_size(networks, size, preset.high_quality_finetuning.phases[-1])
    models, fps = open_models(networks, preset, "high-quality-finetuning"), motion.fps or DEFAULT_FPS
    writer = Writer(results, describe("text-to-video", networks, sampling, motion=motion.motion, fps=fps))
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
    """Clips that begin with a picture. Example: svd generate image photo.jpg -m stable-video-diffusion-img2vid-xt."""
    from svd.files import read_pictures
    from svd.generate import image_to_video

    jobs = seeded(pictures, results)
    preset = load_preset(networks.preset)
    sampling = solving.sampling(base_sampling(networks, preset.evaluation.multiview.sampling), guidance_max)
    frames, height, width = clip_size(networks, size, preset.image_to_video.phases[-1])
    read_pictures(pictures, (height, width))  # a broken picture is named before minutes go into loading and sampling
    models, fps = open_models(networks, preset, "image-to-video"), motion.fps or DEFAULT_FPS
    details = describe("image-to-video", networks, sampling, motion=motion.motion, fps=fps, cond_aug=cond_aug,
                       guidance_min=guidance_min, ramp=ramp)  # fmt: skip
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
    guidance: GuidanceOption = None,
    cond_aug: CondAug = 0.02,
) -> None:
    """Three new frames between any two: 28 frames become 109. --fps is the rate of VIDEO when its file doesn't say."""
    from svd.files import read_clip
    from svd.generate import interpolate as interpolated

    preset = load_preset(networks.preset)
    clip, rate = read_clip(video)
    check_single(results.out, results.count)
    models, fps = open_models(networks, preset, "frame-interpolation"), motion.fps or rate
    sampling = solving.sampling(base_sampling(networks, preset.evaluation.multiview.sampling), guidance)
    details = describe("interpolation", networks, sampling, motion=motion.motion, cond_aug=cond_aug, rounds=rounds)
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
    from svd.files import read_pictures
    from svd.generate import multiview as orbits

    jobs = seeded(pictures, results)
    preset = load_preset(networks.preset)
    phase = preset.multiview_finetuning.phases[-1]
    side = size or phase.height
    read_pictures(pictures, (side, side))
    sampling = solving.sampling(base_sampling(networks, preset.evaluation.multiview.sampling), guidance_max)
    models, fps = open_models(networks, preset, "multiview-finetuning"), motion.fps or DEFAULT_FPS
    details = describe("multi-view", networks, sampling, elevation=elevation, motion=motion.motion, cond_aug=cond_aug)
    writer = Writer(results, details)
    for group in groups(jobs, results.batch):
        clips = orbits(
            models,
            read_pictures([path for path, _ in group], (side, side)),
            elevation,
            views or phase.frames,
            sampling=sampling,
            seed=[seed for _, seed in group],
            fps=fps,
            motion_bucket=motion.motion,
            cond_aug=cond_aug,
            guidance_range=(guidance_min, max(guidance_min, sampling.guidance)),
            ramp=ramp,
        )
        for clip, (path, seed) in zip(clips, group, strict=True):
            writer.save(clip, fps, path.stem, seed, picture=path.name)


def open_models(networks: Networks, preset: Preset, stage: str) -> Models:
    """The networks of the options; without `--model` those that the preset's stage `stage` has made.

    Raises UserError when there is no such model, and for everything that svd.generate.load_models refuses.
    """
    from svd.generate import load_models

    root = OUTPUTS / preset.name
    model = networks.model or root / stage / "unet"
    if not model.exists():
        raise UserError(f"{model}: no such model; run `svd stage {stage} -p {networks.preset}`, or give --model")
    released = model if is_released(model) else None
    device, dtype = _device_and_dtype(networks)
    models = load_models(
        model,
        networks.autoencoder or released or root / "autoencoder",
        networks.encoders or released or root / "encoders",
        preset.encoders,
        device,
        dtype=dtype,
        offload=networks.offload,
        kind=KINDS[networks.objective],
    )
    _apply_loras(models, networks.lora or [])
    return dataclasses.replace(
        models,
        passes="sequential" if networks.sequential else "auto",
        decode_chunk=networks.decode_chunk,
        decode_overlap=networks.decode_overlap,
    )


def _device_and_dtype(networks: Networks):  # type: ignore[no-untyped-def]
    import torch

    device = networks.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = networks.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return device, getattr(torch, dtype)


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


def seeded(items: list[Item], results: Results) -> list[tuple[Item, int]]:
    """Every item `count` times, with a seed each; raises UserError when they would overwrite each other's file."""
    jobs = [item for item in items for _ in range(results.count)]
    check_single(results.out, len(jobs))
    return [(item, results.seed + number) for number, item in enumerate(jobs)]


def groups(items: list[Item], size: int) -> Iterator[list[Item]]:
    """The items in groups of `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def check_single(out: Path, clips: int) -> None:
    """Raises UserError, before any work, for an unknown format and when several clips would be written to one file."""
    from svd.files import check_format

    check_format(out)
    if out.suffix and clips > 1:
        raise UserError(f"--out {out}: a file holds one clip, not {clips}; give a folder")


def is_released(model: Path | None) -> bool:
    """Whether the option names a whole model as Stability publishes it: the folder of a pipeline, or a single file."""
    return model is not None and (model.is_file() or (model / "model_index.json").is_file())


def clip_size(networks: Networks, size: Size, phase: Phase) -> tuple[int, int, int]:
    """Frames, height and width: the options', or what the preset trains last, or what a released model was trained
    at.
    """
    from svd.model.layout import read_config

    known = (phase.frames, phase.height, phase.width)
    model = networks.model
    if model is not None and is_released(model):
        # A single file doesn't say how many frames it was trained on; only its published name does.
        frames = 25 if "xt" in model.stem.lower() else 14
        if model.is_dir():
            frames = int(read_config(model / "unet" / "config.json").get("num_frames", frames))
        known = (frames, 576, 1024)
    return size.frames or known[0], size.height or known[1], size.width or known[2]


def base_sampling(networks: Networks, preset: Sampling) -> Sampling:
    """The preset's sampling, or for a released model the settings that it is published with."""
    return Sampling(steps=25, guidance=3.0) if is_released(networks.model) else preset


def describe(task: str, networks: Networks, sampling: Sampling, **values: object) -> dict[str, str]:
    """What is written into the files, so that a clip can be made again."""
    settings = {**sampling.model_dump(), **values, "task": task, "model": networks.model or networks.preset}
    return {key: str(value) for key, value in settings.items()}


class Writer:
    """Saves clips under readable names and prints them; filters and marks them first when asked to."""

    def __init__(self, results: Results, details: dict[str, str]) -> None:
        from svd.safety import load_safety_filter

        self.results, self.details = results, details
        self.safety: SafetyFilter | None = None
        if results.safety_heads is not None:
            clip = EncodersConfig(model=results.safety_model, weights=results.safety_weights)
            self.safety = load_safety_filter(results.safety_heads, clip)

    def save(self, clip: Tensor, fps: float, name: str, seed: int, **details: str) -> None:
        """Write one clip (T, 3, H, W) in [0, 1]; `name` and `seed` make its file name in a folder."""
        from svd.files import save_clip
        from svd.watermark import MESSAGE

        if self.safety is not None:
            clip, flagged = self.safety.apply(clip)
            if flagged:
                typer.echo(f"{name}: the safety filter blurred this clip", err=True)
        path = self._path(name, seed, len(clip))
        metadata = self.details | details | {"seed": str(seed)}
        save_clip(path, clip, fps, metadata, MESSAGE if self.results.watermark else None)
        typer.echo(str(path))

    def _path(self, name: str, seed: int, frames: int) -> Path:
        out, kind = self.results.out, self.results.format
        if out.suffix:
            return out
        slug = re.sub(r"\W+", "-", name).strip("-").lower()[:60] or "clip"
        stem = f"{slug}-{seed}"
        return out / stem if kind == "png" and frames > 1 else out / f"{stem}.{kind}"
