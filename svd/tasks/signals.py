"""Conditioning signals that tasks share (D.2, D.4–D.6)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from svd.core.errors import UserError
from svd.diffusion.edm import Generators, expand, randn
from svd.latents.loader import Batch

MAX_IDS = 4


def fps_id(fps: float) -> float:
    """The frame rate as the U-Net is told it: fps - 1 (released code and diffusers; a clip at 7 fps has id 6)."""
    return fps - 1


def polar_angle(elevation_degrees: float) -> float:
    """Elevation as the multi-view model is told it: the angle from the vertical axis in radians, pi/2 at the equator.

    The paper (D.6) embeds "the elevation" without a unit; this is the convention of its successor SV3D (`polars_rad`).
    """
    if not -90 <= elevation_degrees <= 90:
        raise UserError(f"an elevation must lie between -90 and 90 degrees, got {elevation_degrees}")
    return math.radians(90 - elevation_degrees)


def micro_conditioning(
    count: int,
    batch: int,
    *,
    fps: float,
    motion_bucket: float,
    cond_aug: float = 0.0,
    elevation_degrees: float | Sequence[float] = 0.0,
) -> Tensor | None:
    """The first `count` of [fps - 1, motion bucket, cond_aug, polar angle] for each of `batch` clips: (B, count)
    float32.

    count: the U-Net's `ids`; 0 gives None. cond_aug: the standard deviation of the noise on the conditioning frame,
    raw, not its logarithm (the order and this convention are the released configuration's).
    """
    if count == 0:
        return None
    if count > MAX_IDS:
        raise UserError(f"the U-Net wants {count} conditioning ids; known are fps, motion bucket, cond_aug, elevation")
    elevations = [elevation_degrees] * batch if isinstance(elevation_degrees, float | int) else elevation_degrees
    if len(elevations) != batch:
        raise UserError(f"{len(elevations)} elevations for {batch} clips; give one for all or one each")
    rows = [[fps_id(fps), motion_bucket, cond_aug, polar_angle(elevation)] for elevation in elevations]
    return torch.tensor(rows, dtype=torch.float32)[:, :count]


def noise_augment(frames: Tensor, sigma: Tensor, generators: Generators = None) -> Tensor:
    """The conditioning frame with noise, in pixel space before the autoencoder (D.4): frames + sigma * noise.

    frames (B, …), sigma (B,); in training ln(sigma) ~ N(-3, 0.5^2). For the interpolation model the same is done to
    latents.
    """
    noise = randn(frames.shape, generators).to(frames)
    return frames + expand(sigma.to(frames), frames) * noise


def text_ids(batch: Batch) -> Tensor:
    """(B, 2): fps - 1 and motion bucket."""
    return torch.stack([batch["fps"] - 1, batch["motion_bucket"]], dim=1)
