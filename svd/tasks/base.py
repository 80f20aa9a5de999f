"""What differs between the models of the paper: how a batch becomes the network's conditioning (§2.6 of the appendix:
D.2–D.6).

Legend: B clips, T frames, S text tokens, D context width, C latent channels, h x w latent size. fps is given to the
network as fps - 1, as in the released code; the conditioning latent is not multiplied by the scaling factor; a
dropped image or latent is replaced by zeros, a dropped text by the empty prompt's embedding (the loader does that).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from svd.diffusion.guidance import Condition
from svd.latents.loader import Batch
from svd.model.autoencoder import Autoencoder
from svd.model.unet import UNet

Name = Literal["image", "text-to-video", "image-to-video", "frame-interpolation", "multiview"]
Conditioner = Callable[[Batch, UNet, Autoencoder | None], Condition]


@dataclass(frozen=True)
class Task:
    """A model of the paper: its channels and ids, and its conditioning.

    ids: vector conditioning, in the order fps, motion, noise augmentation, elevation. pixels: the conditioning frame
    is encoded live by the autoencoder, because its noise is drawn anew in pixel space. one_token: the context is a
    single token.
    """

    name: Name
    in_channels: int
    ids: int
    condition: Conditioner
    temporal: bool = True
    pixels: bool = False
    learned_mask: bool = False
    one_token: bool = False


def dropped(batch: Batch, null_text: Tensor) -> Batch:
    """The batch of the unconditional branch: empty prompt, no image, no conditioning latent; ids as they were (D.1)."""
    zeros = torch.zeros_like(batch["keep_image"])
    unconditional = {**batch, "keep_image": zeros, "keep_concat": zeros}
    if "text" in batch:
        unconditional["text"] = null_text.to(batch["text"]).expand_as(batch["text"])
    return unconditional
