"""`svd generate text|image|interpolate|multiview`: from options to requests. The work is done in svd.generation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.generate_models import chosen_sampling, clip_size, covered_size, fetched, located, open_models
from flows.cli.generate_options import Motion, Networks, Results, Size, Solving, with_options
from flows.cli.generate_results import Writer, check_single, describe, groups, seeded
from svd.config import Ramp
from svd.config.load import load_preset
from svd.core.errors import UserError

generate_app = typer.Typer(help="Generate clips with trained or released models.", no_args_is_help=True)

DEFAULT_FPS = 7.0

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


@generate_app.command("text")
@with_options
def generate_text(
    networks: Networks,
    solving: Solving,
    motion: Motion,
    size: Size,
    results: Results,
    prompts: Annotated[list[str] | None, typer.Argument(help="What to show; one clip for each.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", "-f", help="Text file, one prompt per line.")
    ] = None,
    motion_prompt: Annotated[str | None, typer.Option(help="Other text for the temporal layers: 'panning'.")] = None,
    guidance: GuidanceOption = None,
) -> None:
    """Generate clips from text. Example: svd generate text "a red ball bouncing" --seed 3 --out ball.mp4."""
    from svd.generation import text_to_video
    from svd.tasks.prompts import read_prompts
    from svd.tasks.text_to_video import TEXT_TO_VIDEO

    wanted = list(prompts or []) + (read_prompts(prompts_file) if prompts_file else [])
    if not wanted:
        raise UserError("no prompt: write one behind the command, or give a file with --prompts")
    jobs = seeded(wanted, results)
    networks = fetched(networks, "text_encoder")
    preset = load_preset(networks.preset)
    sampling = chosen_sampling(networks, solving, preset, TEXT_TO_VIDEO, guidance)
    phase, fps = preset.high_quality_finetuning.phases[-1], motion.fps or DEFAULT_FPS
    frames, height, width = clip_size(networks, size, phase)
    networks = located(networks, preset, "high-quality-finetuning")
    models = open_models(networks, preset, "high-quality-finetuning", phase)
    details = describe(TEXT_TO_VIDEO.name, networks, sampling, results, motion=motion.motion, fps=fps,
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


@generate_app.command("image")
@with_options
def generate_image(
    networks: Networks,
    solving: Solving,
    motion: Motion,
    size: Size,
    results: Results,
    pictures: Annotated[list[Path], typer.Argument(help="Images; one clip for each, beginning with it.")],
    guidance_min: GuidanceMin = 1.0,
    guidance_max: GuidanceMax = None,
    ramp: RampOption = "linear",
    cond_aug: CondAug = 0.02,
) -> None:
    """Generate clips that begin with an image. Example: svd generate image photo.jpg -m
    stabilityai/stable-video-diffusion-img2vid-xt.
    """
    from svd.generation import image_to_video
    from svd.media.images import read_images
    from svd.tasks.image_to_video import IMAGE_TO_VIDEO

    jobs = seeded(pictures, results)
    networks = fetched(networks, "image_encoder")
    preset = load_preset(networks.preset)
    sampling = chosen_sampling(networks, solving, preset, IMAGE_TO_VIDEO, guidance_max)
    phase, fps = preset.image_to_video.phases[-1], motion.fps or DEFAULT_FPS
    frames, height, width = clip_size(networks, size, phase)
    read_images(pictures, (height, width))  # a broken image is named before minutes go into loading and sampling
    networks = located(networks, preset, "image-to-video")
    models = open_models(networks, preset, "image-to-video", phase)
    details = describe(IMAGE_TO_VIDEO.name, networks, sampling, results, motion=motion.motion, fps=fps,
                       frames=frames, height=height, width=width, cond_aug=cond_aug,
                       guidance_min=guidance_min, guidance_max=sampling.guidance, ramp=ramp)  # fmt: skip
    writer = Writer(results, details)
    for group in groups(jobs, results.batch):
        clips = image_to_video(
            models,
            read_images([path for path, _ in group], (height, width)),
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


@generate_app.command("interpolate")
@with_options
def generate_interpolate(
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
    """Generate three frames between any two: 28 become 109. --fps is the rate of VIDEO when its file doesn't say."""
    from svd.generation import interpolate
    from svd.media.clips import load_video
    from svd.media.resize import cover
    from svd.tasks.interpolation import INTERPOLATION, RATE

    preset = load_preset(networks.preset)
    clip, rate = load_video(video)
    check_single(results.out, results.count)
    networks = fetched(networks, "image_encoder")
    sampling = chosen_sampling(networks, solving, preset, INTERPOLATION, guidance)
    networks, fps = located(networks, preset, "frame-interpolation"), motion.fps or rate
    models = open_models(networks, preset, "frame-interpolation", preset.frame_interpolation.phases[-1])
    height, width = covered_size(height, width, (clip.shape[-2], clip.shape[-1]), models.multiple)
    clip = cover(clip, height, width)
    details = describe(INTERPOLATION.name, networks, sampling, results, motion=motion.motion, fps=fps,
                       cond_aug=cond_aug, height=height, width=width, rounds=rounds)  # fmt: skip
    writer = Writer(results, details)
    for _, seed in seeded([video], results):
        longer = interpolate(models, clip, fps=fps, motion_bucket=motion.motion, sampling=sampling, seed=seed,
                             rounds=rounds, cond_aug=cond_aug, windows_at_once=max(4, results.batch))  # fmt: skip
        writer.save(longer, fps * RATE**rounds, video.stem, seed, video=video.name)


@generate_app.command("multiview")
@with_options
def generate_multiview(
    networks: Networks,
    solving: Solving,
    motion: Motion,
    results: Results,
    pictures: Annotated[list[Path], typer.Argument(help="Images of an object on white or transparent ground.")],
    elevation: Annotated[float, typer.Option(min=-90, max=90, help="Of the camera in the image, degrees.")] = 0.0,
    views: Annotated[int | None, typer.Option(min=1, help="Views.", show_default="as the preset trains")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="as the preset trains")] = None,
    guidance_min: GuidanceMin = 1.0,
    guidance_max: GuidanceMax = None,
    ramp: RampOption = "triangle",
    cond_aug: CondAug = 0.02,
) -> None:
    """Generate orbits around an object; the last view is the given one. Example: svd generate multiview cup.png
    --elevation 10.
    """
    from svd.generation import multiview
    from svd.media.images import read_images
    from svd.tasks.multiview import MULTIVIEW

    jobs = seeded(pictures, results)
    networks = fetched(networks, "image_encoder")
    preset = load_preset(networks.preset)
    phase = preset.multiview_finetuning.phases[-1]
    side, count = size or phase.height, views or phase.frames
    read_images(pictures, (side, side))
    sampling = chosen_sampling(networks, solving, preset, MULTIVIEW, guidance_max)
    networks, fps = located(networks, preset, "multiview-finetuning"), motion.fps or DEFAULT_FPS
    models = open_models(networks, preset, "multiview-finetuning", phase)
    guidance_range = guidance_min, max(guidance_min, sampling.guidance)
    details = describe(MULTIVIEW.name, networks, sampling, results, motion=motion.motion, fps=fps, elevation=elevation,
                       views=count, size=side, cond_aug=cond_aug,
                       guidance_min=guidance_min, guidance_max=guidance_range[1], ramp=ramp)  # fmt: skip
    writer = Writer(results, details)
    for group in groups(jobs, results.batch):
        clips = multiview(
            models,
            read_images([path for path, _ in group], (side, side)),
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
