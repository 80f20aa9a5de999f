"""Frame interpolation (§4.4, D.5): three frames between two given ones, four times the frame rate.

The network reads the two latents, with noise, around a learned mask embedding, a mask channel, and two CLIP tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from svd.diffusion.edm import expand
from svd.diffusion.guidance import Condition
from svd.latents.loader import Batch
from svd.model.autoencoder import Autoencoder
from svd.model.unet import UNet
from svd.tasks.base import RELEASED, Task
from svd.tasks.signals import ClipSignals, given, kept, noise_augment, of_batch, with_noise

WINDOW = 5  # frames: two given, three new
RATE = WINDOW - 1  # how much faster the result is


def from_ends(
    tokens: Tensor,
    ends: Tensor,
    *,
    fps: float,
    motion_bucket: float,
    cond_aug: float,
    generators: Sequence[torch.Generator],
) -> ClipSignals:
    """Return the signals of B windows from their first and last frame.

    tokens (B, 2, D): CLIP embeddings. ends (B, 2, C, h, w): unscaled latents; neighbouring windows share a frame, so
    both come encoded. fps: of the result. cond_aug: standard deviation of the noise on the latents, drawn from the
    windows' `generators`.
    """
    noisy = noise_augment(ends, torch.full((len(ends),), cond_aug, device=ends.device), generators)
    return ClipSignals(WINDOW, fps, motion_bucket, cond_aug, image=tokens, latents=noisy)


def _observe(batch: Batch, autoencoder: Autoencoder | None) -> ClipSignals:
    """Take the ends of the clip's own latents, without the scaling factor."""
    latents = batch["latents"]
    ends = latents[:, [0, -1]] / expand(batch["scaling_factor"], latents)
    noisy = with_noise(ends, batch["conditioning_sigma"], batch["latent_noise"])
    signals = replace(of_batch(batch), image=batch["image"][:, [0, -1]], latents=noisy)
    return kept(signals, batch["keep_image"], batch["keep_concat"])


def _build(signals: ClipSignals, unet: UNet) -> Condition:
    first, last = given(signals.latents).unbind(1)
    channels = unet.interpolation_channels(first, last, signals.frames)
    return Condition(given(signals.image), signals.ids(unet.config.ids), channels)


INTERPOLATION = Task(
    name="interpolation",
    section="interpolation",
    stages=("frame-interpolation",),
    ids=3,
    observe=_observe,
    build=_build,
    learned_mask=True,
    columns={"first": "image", "last": "image"},
    sampling=RELEASED,
)
