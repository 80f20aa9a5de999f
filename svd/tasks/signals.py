"""The conditioning signals that tasks share (§2, D.1, D.2, D.4–D.6; the released code where the paper is silent).

Legend: B clips, T frames, S text tokens, D context width, C latent channels, h x w latent size. Conventions: the
network is given fps - 1; a conditioning latent isn't multiplied by the scaling factor; the CLIP embedding of an image
is that of the clean image, its latent that of the noisy one; a dropped image or latent is zero, a dropped text is the
empty prompt's embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from svd.core.errors import UserError
from svd.diffusion.edm import Generators, expand, randn
from svd.latents.loader import Batch

Number = TypeVar("Number", float, Tensor)
Values: TypeAlias = float | Sequence[float] | Tensor  # one number for all clips, or one per clip


@dataclass(frozen=True)
class ClipSignals:
    """Facts about B clips of T = `frames` frames, encoded; a task's `build` takes those that its network reads.

    text (B, S, D), or (B, T, S, D) with a text per frame. motion_text (B, S, D): a text for the temporal layers alone
    (temporal prompting, E.5.4). image (B, N, D): CLIP embeddings of N given frames. latents (B, N, C, h, w): their
    latents, with noise, unscaled. cond_aug: standard deviation of that noise. elevation: degrees. image_only (B,)
    bool: clips whose frames are unrelated images (joint training).
    """

    frames: int
    fps: Values
    motion_bucket: Values
    cond_aug: Values = 0.0
    elevation: Values = 0.0
    text: Tensor | None = None
    motion_text: Tensor | None = None
    image: Tensor | None = None
    latents: Tensor | None = None
    image_only: Tensor | None = None

    def ids(self, count: int) -> Tensor | None:
        """Return the first `count` conditioning ids, (B, count); None for 0."""
        context = given(self.text if self.image is None else self.image)
        return micro_conditioning(
            count,
            len(context),
            fps=self.fps,
            motion_bucket=self.motion_bucket,
            cond_aug=self.cond_aug,
            elevation_degrees=self.elevation,
        )


class SignalEncoders(Protocol):
    """The networks that turn a request into signals; `svd.generation.Models` implements it."""

    def encode_texts(self, *groups: Sequence[str]) -> list[Tensor]:
        """Return context tokens (B, S, D) of each group of prompts."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Return CLIP embeddings (B, D) of images (B, 3, H, W) in [-1, 1]."""

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Return unscaled posterior means (B, T, C, h, w) of frames (B, T, 3, H, W) in [-1, 1]."""


def given(signal: Tensor | None) -> Tensor:
    """Return a signal that the task can't do without; raise ValueError when it is missing."""
    if signal is None:
        raise ValueError("a signal that the task conditions on is missing")
    return signal


def of_batch(batch: Batch) -> ClipSignals:
    """Return the signals that every training batch holds; the task adds images and latents, see `kept`."""
    return ClipSignals(
        frames=batch["latents"].shape[1],
        fps=batch["fps"],
        motion_bucket=batch["motion_bucket"],
        cond_aug=batch["conditioning_sigma"],
        elevation=batch["elevation"],
        text=batch.get("text"),
        image_only=batch.get("image_only"),
    )


def kept(signals: ClipSignals, image: Tensor, latents: Tensor) -> ClipSignals:
    """Zero the image embeddings and the conditioning latents of the clips whose flag (B,), 0 or 1, is 0 (D.1, D.4)."""
    return replace(
        signals,
        image=None if signals.image is None else signals.image * expand(image, signals.image),
        latents=None if signals.latents is None else signals.latents * expand(latents, signals.latents),
    )


def dropped(signals: ClipSignals, null_text: Tensor | None = None) -> ClipSignals:
    """Return the signals of the unconditional branch: empty prompt, no image, no latent; ids as they were (D.1).

    null_text (S, D) or (B, S, D): the empty prompt's embedding; needed when there is a text.
    """

    def emptied(text: Tensor | None) -> Tensor | None:
        return None if text is None else given(null_text).to(text).expand_as(text)

    def zeroed(signal: Tensor | None) -> Tensor | None:
        return None if signal is None else torch.zeros_like(signal)

    return replace(
        signals,
        text=emptied(signals.text),
        motion_text=emptied(signals.motion_text),
        image=zeroed(signals.image),
        latents=zeroed(signals.latents),
    )


def with_signals_of(signals: ClipSignals, others: ClipSignals) -> ClipSignals:
    """Give B clips the conditioning frames of B others, or the others' texts where the task has no frames.

    What a network then loses is what it takes from them.
    """
    if signals.latents is not None:
        return replace(signals, latents=given(others.latents))
    return replace(signals, text=given(others.text))


def fps_id(fps: Number) -> Number:
    """Return the network's frame rate, fps - 1 (released code and diffusers; a clip at 7 fps has id 6)."""
    return fps - 1


def polar_angle(elevation_degrees: Number) -> Number:
    """Return the angle from the vertical axis in radians, pi/2 at the equator: how the network is given an elevation.

    The paper (D.6) embeds "the elevation" without a unit; this is the convention of its successor SV3D (`polars_rad`).
    Raises UserError for a number beyond ±90; tensors, which come from training data, aren't checked: a GPU would wait.
    """
    if not isinstance(elevation_degrees, Tensor) and not -90 <= elevation_degrees <= 90:
        raise UserError(f"an elevation must lie between -90 and 90 degrees, got {elevation_degrees}")
    return (90 - elevation_degrees) * (math.pi / 180)


def micro_conditioning(
    count: int,
    batch: int,
    *,
    fps: Values,
    motion_bucket: Values,
    cond_aug: Values = 0.0,
    elevation_degrees: Values = 0.0,
) -> Tensor | None:
    """Return the first `count` of [fps - 1, motion bucket, cond_aug, polar angle] per clip: (B, count) float32.

    count: the network's `ids`; 0 gives None. cond_aug: the standard deviation of the noise on the conditioning frame,
    raw, not its logarithm (order and convention are the released configuration's). Raises UserError for a wrong number
    of values and for an elevation beyond ±90 degrees.
    """
    if count == 0:
        return None
    columns: list[tuple[str, Values, Callable[[Any], Any]]] = [
        ("frame rates", fps, fps_id),
        ("motion buckets", motion_bucket, _unchanged),
        ("noise levels", cond_aug, _unchanged),
        ("elevations", elevation_degrees, polar_angle),
    ]
    if count > len(columns):
        raise UserError(f"the U-Net wants {count} conditioning ids; known are fps, motion bucket, cond_aug, elevation")
    return torch.stack([_column(*column, batch).float() for column in columns[:count]], dim=1)


def _unchanged(value: Any) -> Any:
    return value


def _column(what: str, values: Values, convert: Callable[[Any], Any], batch: int) -> Tensor:
    """Return the converted values, (B,); numbers are converted in float64, tensors in their own type."""
    if isinstance(values, Tensor):
        return convert(values)
    numbers = [values] * batch if isinstance(values, float | int) else values
    if len(numbers) != batch:
        raise UserError(f"{len(numbers)} {what} for {batch} clips; give one for all or one each")
    return torch.tensor([convert(number) for number in numbers], dtype=torch.float64)


def noise_augment(frames: Tensor, sigma: Tensor, generators: Generators = None) -> Tensor:
    """Add the noise of a conditioning frame, drawn here: frames + sigma * noise (D.4), see `with_noise`."""
    return with_noise(frames, sigma, randn(frames.shape, generators).to(frames))


def with_noise(frames: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Return frames + sigma * noise, for frames (B, …) and sigma (B,).

    Image-to-video and multi-view noise the pixels before the autoencoder, interpolation its latents (D.4, D.5); in
    training ln(sigma) ~ N(-3, 0.5^2).
    """
    return frames + expand(sigma.to(frames), frames) * noise
