"""Clips from text and from images: `text_to_video`, `image_to_video`, `multiview` (§4, App. D, E.4).

Images and clips are (…, 3, H, W) in [0, 1], results float32 on the CPU. Every clip has a seed of its own from which all
its noise is drawn on the CPU (first the conditioning image's, then the latents'). So a clip doesn't depend on the rest
of its batch, nor its noise on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svd.config import Ramp, Sampling
from svd.core.errors import UserError
from svd.diffusion.edm import randn
from svd.diffusion.guidance import constant, linear, triangle
from svd.generation.models import Models, check_request
from svd.generation.pipeline import clip_generators, generate_latents
from svd.media.resize import cover
from svd.tasks.base import Task
from svd.tasks.image_to_video import IMAGE_TO_VIDEO, from_images
from svd.tasks.multiview import MULTIVIEW
from svd.tasks.signals import ClipSignals, Values
from svd.tasks.text_to_video import TEXT_TO_VIDEO, from_prompts


@torch.no_grad()
def text_to_video(
    models: Models,
    prompts: Sequence[str],
    *,
    frames: int,
    height: int,
    width: int,
    fps: float,
    motion_bucket: float,
    sampling: Sampling,
    seed: int | Sequence[int],
    motion_prompt: str | None = None,
    progress: bool = True,
) -> Tensor:
    """Generate clips (B, T, 3, H, W) in [0, 1] of `prompts` (§4.1, D.3; E.4 for the settings of the evaluation).

    fps: frames per second of the clip. motion_bucket: amount of motion, 0…255. seed: one per clip, or a number: clip i
    then has seed + i. motion_prompt: what the temporal layers read instead of the prompt (temporal prompting, E.5.4).
    An image model (no temporal layers) makes clips of one frame. Raises UserError when model and request don't fit.

        models = load_models(unet_folder, autoencoder_folder, encoders_folder, preset.encoders)
        clips = text_to_video(models, ["a red ball bouncing"], frames=14, height=320, width=576, fps=7,
                              motion_bucket=127, sampling=Sampling(), seed=0)
    """
    check_request(models, TEXT_TO_VIDEO, frames, height, width)
    if not prompts:
        raise UserError("no prompts given")
    signals, null = from_prompts(
        models, prompts, frames=frames, fps=fps, motion_bucket=motion_bucket, motion_prompt=motion_prompt
    )
    scale = constant(sampling.guidance, frames)
    sources = clip_generators(seed, len(prompts))
    return _clips(models, TEXT_TO_VIDEO, signals, sources, (height, width), scale, sampling, progress, null)


@torch.no_grad()
def image_to_video(
    models: Models,
    images: Tensor,
    *,
    frames: int,
    height: int,
    width: int,
    fps: Values,
    motion_bucket: Values,
    sampling: Sampling,
    seed: int | Sequence[int],
    cond_aug: float = 0.02,
    guidance_range: tuple[float, float] = (1.0, 3.0),
    ramp: Ramp = "linear",
    progress: bool = True,
) -> Tensor:
    """Generate clips (B, T, 3, H, W) in [0, 1] that begin with `images` (B, 3, h, w) in [0, 1] (§4.2, D.4).

    fps, motion_bucket: one number for all clips, or one per clip. Images of another size are scaled to cover
    height x width and cropped in the middle. cond_aug: standard deviation of the noise on the conditioning image (in
    [-1, 1] units). guidance_range: guidance at the first and the last frame for the linear ramp of D.4.1, at the ends
    and in the middle for `triangle`; it takes the place of `sampling.guidance`. Raises UserError when model and request
    don't fit.
    """
    check_request(models, IMAGE_TO_VIDEO, frames, height, width)
    sources = clip_generators(seed, len(images))
    signals = from_images(
        models,
        cover(images, height, width) * 2 - 1,
        frames=frames,
        fps=fps,
        motion_bucket=motion_bucket,
        cond_aug=cond_aug,
        generators=sources,
    )
    scale = guidance_ramp(ramp, guidance_range, frames)
    return _clips(models, IMAGE_TO_VIDEO, signals, sources, (height, width), scale, sampling, progress)


@torch.no_grad()
def multiview(
    models: Models,
    images: Tensor,
    elevation_degrees: float | Sequence[float],
    views: int,
    *,
    sampling: Sampling,
    seed: int | Sequence[int],
    fps: float = 7,
    motion_bucket: float = 127,
    cond_aug: float = 0.02,
    guidance_range: tuple[float, float] | None = None,
    ramp: Ramp = "triangle",
    progress: bool = True,
) -> Tensor:
    """Generate orbits (B, V, 3, H, W) in [0, 1] around the objects in `images` (B, 3, H, W) (§4.5, D.6).

    View v = 0 … V - 1 is seen from azimuth 360 (v + 1) / V degrees, so the last one is the conditioning view.
    elevation_degrees: height of the camera above the equator in the images, one number or one per image.
    guidance_range: default 1 to `sampling.guidance`, highest at the back of the object (triangle). fps and
    motion_bucket are constants of the training set. Raises UserError when model and request don't fit.
    """
    height, width = images.shape[-2:]
    check_request(models, MULTIVIEW, views, height, width)
    if models.unet.config.ids < MULTIVIEW.ids:
        raise UserError("this U-Net has no elevation input: it's an image-to-video model; give a multi-view one")
    sources = clip_generators(seed, len(images))
    signals = from_images(
        models,
        images.float() * 2 - 1,
        frames=views,
        fps=fps,
        motion_bucket=motion_bucket,
        cond_aug=cond_aug,
        elevation_degrees=elevation_degrees,
        generators=sources,
    )
    scale = guidance_ramp(ramp, guidance_range or (1.0, max(1.0, sampling.guidance)), views)
    return _clips(models, MULTIVIEW, signals, sources, (height, width), scale, sampling, progress)


def guidance_ramp(ramp: Ramp, guidance_range: tuple[float, float], frames: int) -> Tensor:
    """Return (T,) the guidance of each frame (D.4.1, Fig. 16); `constant` takes the upper end of the range."""
    low, high = guidance_range
    if ramp == "constant":
        return constant(high, frames)
    return linear(low, high, frames) if ramp == "linear" else triangle(low, high, frames)


def _clips(
    models: Models,
    task: Task,
    signals: ClipSignals,
    sources: Sequence[torch.Generator],
    size: tuple[int, int],
    scale: Tensor,
    sampling: Sampling,
    progress: bool,
    null_text: Tensor | None = None,
) -> Tensor:
    """Draw the latents' noise from the clips' generators, denoise and decode."""
    noise = randn(models.latent_shape(len(sources), signals.frames, *size), sources)
    latents = generate_latents(models, task, signals, noise, scale, sampling, null_text=null_text, progress=progress)
    return models.decode(latents, progress)
