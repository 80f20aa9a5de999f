"""A task of the paper: which network it needs, how that network is conditioned, and how clips are sampled from it.

Each task is one file beside this one (§4.1–4.5, D.2–D.6). Training and generation reach a network's conditioning by
the same two steps: facts about the clips become `ClipSignals`, and the task's `build` makes the `Condition` of them.
Only the first step has two sides: `observe` reads a training batch, and a function such as `from_images`, in the task's
file, starts from a user's request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from svd.config import Preset, Sampling
from svd.diffusion.guidance import Condition
from svd.latents.loader import Batch
from svd.model.autoencoder import Autoencoder
from svd.model.unet import UNet
from svd.tasks.signals import ClipSignals

Column = Literal["text", "image", "number"]

# How the released SVD is sampled in diffusers; its guidance rises from 1 over the frames (D.4.1).
RELEASED = Sampling(steps=25, guidance=3.0)


@dataclass(frozen=True)
class Task:
    """One task: its network, its conditioning, its columns when served, and its default sampling.

    name: as messages and the metadata of clips write it. section: its key in the preset's `generation`, which is the
    name of its file. stages: the stages that train it; the first one's model is the default of `svd generate`.
    ids: how many of [fps - 1, motion bucket, noise augmentation, polar angle] the network is given, in this order.
    observe, build: the signals of a training batch, and the conditioning that follows from signals.
    temporal: the network has temporal layers. pixels: the conditioning frame is encoded live by the autoencoder,
    because its noise is drawn anew in pixel space. learned_mask: the network reads first and last latent around a
    learned mask embedding, and a mask channel. one_token: the cross-attention reads a single token.
    columns: input columns of the registered model. Texts and numbers are named as the fields of
    `svd.generation.requests.Request`; images, base64 text, become its `images` in this order.
    sampling: how it is sampled when the preset says nothing.
    """

    name: str
    section: str
    stages: tuple[str, ...]
    ids: int
    observe: Callable[[Batch, Autoencoder | None], ClipSignals]
    build: Callable[[ClipSignals, UNet], Condition]
    temporal: bool = True
    pixels: bool = False
    learned_mask: bool = False
    one_token: bool = False
    columns: Mapping[str, Column] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)

    def in_channels(self, latent_channels: int = 4) -> int:
        """Return the network's input channels: noisy latents, conditioning latents, mask (4, 8 or 9)."""
        given = latent_channels if self.pixels or self.learned_mask else 0
        return latent_channels + given + self.learned_mask

    def condition(self, batch: Batch, unet: UNet, autoencoder: Autoencoder | None) -> Condition:
        """Return the conditioning of a training batch."""
        return self.build(self.observe(batch, autoencoder), unet)

    def preset_sampling(self, preset: Preset) -> Sampling:
        """Return the preset's `generation.<section>.sampling`, or the task's own."""
        chosen: Sampling | None = getattr(preset.generation, self.section).sampling
        return chosen or self.sampling
