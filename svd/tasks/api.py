"""Generating clips: text-to-video, image-to-video, interpolation and multi-view orbits, one function each (§4, App.
D, E.4).

Conventions, those of the released code: the U-Net is told fps - 1; the conditioning latent isn't multiplied by the
scaling factor; a picture's CLIP embedding is that of the clean picture, its latent that of the noisy one; without
condition both are zero, and a text is the empty prompt's embedding. Pictures and clips are (…, 3, H, W) in [0, 1],
results float32 on the CPU.

Every clip has a seed of its own from which all its noise is drawn on the CPU (first the conditioning picture's, then
the latents'), so a clip doesn't depend on the rest of its batch, nor its noise on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from svd.config import Sampling
from svd.core.errors import UserError
from svd.diffusion.edm import randn
from svd.diffusion.guidance import Condition, constant, linear, triangle
from svd.generation.models import Models, check, decode, denoise, encode, generators, latent_shape, load_models, working
from svd.media.resize import cover
from svd.tasks.prompts import read_prompts
from svd.tasks.signals import micro_conditioning, noise_augment

__all__ = [
    "Models",
    "Ramp",
    "image_to_video",
    "interpolate",
    "load_models",
    "multiview",
    "read_prompts",
    "text_to_video",
]

Ramp = Literal["constant", "linear", "triangle"]

_WINDOW = 5
_RATE = _WINDOW - 1


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
    """Clips (B, T, 3, H, W) in [0, 1] of `prompts` (§4.1, D.3; E.4 for the settings of the evaluation).

    fps: frames per second of the clip. motion_bucket: amount of motion, 0…255. seed: one for each clip, or a number,
    clip i then has seed + i. motion_prompt: what the temporal layers read instead of the prompt (temporal prompting,
    E.5.4). An image model (no temporal layers) makes clips of one frame. Raises UserError when model and request
    don't fit.
    """
    check(models, 4, frames, height, width)
    batch = len(prompts)
    if not batch:
        raise UserError("no prompts given")
    with working(models, models.encoders.text) as text:
        context, null = text(prompts), text([""]).expand(batch, -1, -1)
        motion = None if motion_prompt is None else text([motion_prompt]).expand(batch, -1, -1)
    ids = micro_conditioning(models.unet.config.ids, batch, fps=fps, motion_bucket=motion_bucket)
    cond = Condition(context, ids, None, motion)
    uncond = Condition(null, ids, None, None if motion is None else null)
    noise = randn(latent_shape(models, batch, frames, height, width), generators(seed, batch))
    latents = denoise(models, noise, cond, uncond, constant(sampling.guidance, frames), sampling, progress)
    return decode(models, latents, progress)


@torch.no_grad()
def image_to_video(
    models: Models,
    images: Tensor,
    *,
    frames: int,
    height: int,
    width: int,
    fps: float,
    motion_bucket: float,
    sampling: Sampling,
    seed: int | Sequence[int],
    cond_aug: float = 0.02,
    guidance_range: tuple[float, float] = (1.0, 3.0),
    ramp: Ramp = "linear",
    progress: bool = True,
) -> Tensor:
    """Clips (B, T, 3, H, W) in [0, 1] that begin with `images` (B, 3, h, w) in [0, 1] (§4.2, D.4).

    Pictures of another size are scaled to cover height x width and cropped in the middle. cond_aug: standard
    deviation of the noise on the conditioning picture (in [-1, 1] units). guidance_range: guidance at the first and
    the last frame for the linear ramp of D.4.1, at the ends and in the middle for `triangle`; it takes the place of
    `sampling.guidance`. Raises UserError when model and request don't fit.
    """
    check(models, 8, frames, height, width)
    ids = micro_conditioning(
        models.unet.config.ids, len(images), fps=fps, motion_bucket=motion_bucket, cond_aug=cond_aug
    )
    scale = guidance_ramp(ramp, guidance_range, frames)
    return _from_image(models, cover(images, height, width), ids, cond_aug, scale, sampling, seed, progress)


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
    """Orbits (B, V, 3, H, W) in [0, 1] around the objects in `images` (B, 3, H, W) (§4.5, D.6).

    View v = 0 … V - 1 is seen from azimuth 360 (v + 1) / V degrees, so the last one is the conditioning view.
    elevation_degrees: height of the camera above the equator in the pictures, one number or one each. guidance_range:
    default 1 to `sampling.guidance`, highest at the back of the object (triangle). fps and motion_bucket are
    constants of the training set. Raises UserError when model and request don't fit.
    """
    height, width = images.shape[-2:]
    check(models, 8, views, height, width)
    if models.unet.config.ids < 4:
        raise UserError("this U-Net has no elevation input: it's an image-to-video model; give a multi-view one")
    ids = micro_conditioning(
        models.unet.config.ids,
        len(images),
        fps=fps,
        motion_bucket=motion_bucket,
        cond_aug=cond_aug,
        elevation_degrees=elevation_degrees,
    )
    scale = guidance_ramp(ramp, guidance_range or (1.0, max(1.0, sampling.guidance)), views)
    return _from_image(models, images.float(), ids, cond_aug, scale, sampling, seed, progress)


def guidance_ramp(ramp: Ramp, guidance_range: tuple[float, float], frames: int) -> Tensor:
    """(T,) guidance of each frame (D.4.1, Fig. 16); `constant` takes the upper end of the range."""
    low, high = guidance_range
    if ramp == "constant":
        return constant(high, frames)
    return linear(low, high, frames) if ramp == "linear" else triangle(low, high, frames)


def _from_image(
    models: Models,
    images: Tensor,
    ids: Tensor | None,
    cond_aug: float,
    scale: Tensor,
    sampling: Sampling,
    seed: int | Sequence[int],
    progress: bool,
) -> Tensor:
    """Image-to-video and multi-view: one CLIP token, and one noisy conditioning latent copied to all frames (D.4)."""
    batch, frames = len(images), len(scale)
    pictures, sources = images * 2 - 1, generators(seed, batch)
    with working(models, models.encoders.image) as image:
        context = image(pictures.to(models.device))[:, None]
    noisy = noise_augment(pictures, torch.full((batch,), cond_aug), sources)
    latent = encode(models, noisy[:, None]).expand(-1, frames, -1, -1, -1)
    noise = randn(latent_shape(models, batch, frames, *images.shape[-2:]), sources)
    cond = Condition(context, ids, latent)
    uncond = Condition(torch.zeros_like(context), ids, torch.zeros_like(latent))
    return decode(models, denoise(models, noise, cond, uncond, scale, sampling, progress), progress)


@torch.no_grad()
def interpolate(
    models: Models,
    video: Tensor,
    *,
    fps: float,
    motion_bucket: float,
    sampling: Sampling,
    seed: int,
    rounds: int = 1,
    cond_aug: float = 0.02,
    windows_at_once: int = 4,
    progress: bool = True,
) -> Tensor:
    """Three new frames between any two: (N, 3, H, W) in [0, 1] to (4 (N - 1) + 1, 3, H, W), `rounds` times (§4.4, D.5).

    28 frames become 109. fps: frames per second of `video`; the result has fps * 4^rounds. Each pair of neighbours
    is the first and last frame of a window of five. cond_aug: standard deviation of the noise on the two given
    latents. The given frames go through the autoencoder like the new ones, because a clip in which every fourth
    frame is sharper flickers. windows_at_once: windows denoised together; their noise, drawn from (seed, round,
    window), doesn't depend on it. Raises UserError when model and request don't fit.
    """
    check(models, 9, _WINDOW, *video.shape[-2:])
    if len(video) < 2:
        raise UserError(f"interpolation needs at least 2 frames, got {len(video)}")
    for number in range(rounds):
        latents = _interpolated(models, video, (seed, number), fps * _RATE, motion_bucket, sampling, cond_aug,
                                windows_at_once, progress)  # fmt: skip
        video, fps = decode(models, latents[None], progress)[0], fps * _RATE
    return video


def _interpolated(
    models: Models,
    video: Tensor,
    key: tuple[int, int],
    fps: float,
    motion_bucket: float,
    sampling: Sampling,
    cond_aug: float,
    at_once: int,
    progress: bool,
) -> Tensor:
    """Scaled latents (4 (N - 1) + 1, C, h, w): those of the given frames, and of three new ones in each gap."""
    frames = video.float() * 2 - 1
    with working(models, models.encoders.image) as image:
        tokens = torch.cat([image(part.to(models.device)) for part in frames.split(models.decode_chunk)])
    keys = encode(models, frames[None])[0]
    pairs = torch.arange(len(video) - 1)
    out = keys[:1] * models.autoencoder.config.scaling_factor
    for group in tqdm(pairs.split(at_once), desc="interpolate", unit="window group", disable=not progress):
        ids = micro_conditioning(
            models.unet.config.ids, len(group), fps=fps, motion_bucket=motion_bucket, cond_aug=cond_aug
        )
        sources = [torch.Generator().manual_seed(_window_seed(*key, int(i))) for i in group]
        context = torch.stack([tokens[group], tokens[group + 1]], 1)
        ends = torch.stack([keys[group], keys[group + 1]], 1)
        latents = _windows(models, ends, context, ids, sources, cond_aug, sampling)
        last = ends[:, 1:] * models.autoencoder.config.scaling_factor
        out = torch.cat([out, torch.cat([latents[:, 1:-1], last], 1).flatten(0, 1)])
    return out


def _windows(
    models: Models,
    ends: Tensor,
    context: Tensor,
    ids: Tensor | None,
    sources: list[torch.Generator],
    cond_aug: float,
    sampling: Sampling,
) -> Tensor:
    """Denoise windows (W, 5, C, h, w) whose unscaled first and last latents are `ends` (W, 2, C, h, w)."""
    noisy = noise_augment(ends, torch.full((len(ends),), cond_aug, device=ends.device), sources)
    concat = models.unet.interpolation_channels(noisy[:, 0], noisy[:, 1], _WINDOW)
    empty = torch.zeros_like(noisy[:, 0])
    uncond_concat = models.unet.interpolation_channels(empty, empty, _WINDOW)
    noise = randn((len(ends), _WINDOW, *ends.shape[2:]), sources)
    cond = Condition(context, ids, concat)
    uncond = Condition(torch.zeros_like(context), ids, uncond_concat)
    return denoise(models, noise, cond, uncond, constant(sampling.guidance, _WINDOW), sampling, progress=False)


def _window_seed(seed: int, number: int, window: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{number}/{window}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
