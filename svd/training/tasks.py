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

from svd.data.loader import Batch
from svd.diffusion.edm import expand
from svd.diffusion.guidance import Condition
from svd.model.autoencoder import Autoencoder, mean
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


def text_ids(batch: Batch) -> Tensor:
    """(B, 2): fps - 1 and motion bucket."""
    return torch.stack([batch["fps"] - 1, batch["motion_bucket"]], dim=1)


def _image(batch: Batch, unet: UNet, autoencoder: Autoencoder | None) -> Condition:
    """Stage I: text alone (D.2)."""
    return Condition(batch["text"])


def _text_to_video(batch: Batch, unet: UNet, autoencoder: Autoencoder | None) -> Condition:
    """Stages II and III: text, fps, motion (D.2, D.3); in a joint batch also which clips are images."""
    return Condition(batch["text"], text_ids(batch), image_only=batch.get("image_only"))


def noisy_conditioning_latent(batch: Batch, autoencoder: Autoencoder) -> Tensor:
    """(B, C, h, w): posterior mean of the conditioning frame with pixel noise of strength conditioning_sigma (D.4)."""
    sigma = batch["conditioning_sigma"]
    noisy = batch["frame"] + expand(sigma, batch["frame"]) * batch["frame_noise"]
    with torch.no_grad():
        return mean(autoencoder.encode(noisy[:, None].to(next(autoencoder.parameters()).dtype)))[:, 0].float()


def _from_image(batch: Batch, autoencoder: Autoencoder | None, token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Context (B, 1, D), ids (B, 3) and concat (B, T, C, h, w) of a model that starts from a picture."""
    if autoencoder is None:
        raise ValueError("a task with a conditioning frame needs the autoencoder")
    context = batch["image"][:, [token]] * expand(batch["keep_image"], batch["image"])
    latent = noisy_conditioning_latent(batch, autoencoder)
    latent = latent * expand(batch["keep_concat"], latent)
    ids = torch.cat([text_ids(batch), batch["conditioning_sigma"][:, None]], dim=1)
    return context, ids, latent[:, None].expand(-1, batch["latents"].shape[1], -1, -1, -1)


def _image_to_video(batch: Batch, unet: UNet, autoencoder: Autoencoder | None) -> Condition:
    """The first frame as CLIP token and, noise-augmented, as latent channels (§4.2, D.4)."""
    return Condition(*_from_image(batch, autoencoder, token=0))


def _multiview(batch: Batch, unet: UNet, autoencoder: Autoencoder | None) -> Condition:
    """As image-to-video, with the polar angle of the orbit; the last view is the conditioning one (§4.5, D.6)."""
    context, ids, concat = _from_image(batch, autoencoder, token=-1)
    polar = torch.deg2rad(90 - batch["elevation"])
    return Condition(context, torch.cat([ids, polar[:, None]], dim=1), concat)


def _interpolation(batch: Batch, unet: UNet, autoencoder: Autoencoder | None) -> Condition:
    """First and last latent with latent-space noise around the learned mask embedding, and two CLIP tokens (§4.4, D.5).

    The latents are unscaled, as in image-to-video; ids are fps, motion, noise augmentation.
    """
    latents, sigma = batch["latents"], batch["conditioning_sigma"]
    ends = latents[:, [0, -1]] / expand(batch["scaling_factor"], latents)
    ends = ends + expand(sigma, ends) * batch["latent_noise"]
    ends = ends * expand(batch["keep_concat"], ends)
    context = batch["image"][:, [0, -1]] * expand(batch["keep_image"], batch["image"])
    ids = torch.cat([text_ids(batch), sigma[:, None]], dim=1)
    return Condition(context, ids, unet.interpolation_channels(ends[:, 0], ends[:, 1], latents.shape[1]))


def dropped(batch: Batch, null_text: Tensor) -> Batch:
    """The batch of the unconditional branch: empty prompt, no image, no conditioning latent; ids as they were (D.1)."""
    zeros = torch.zeros_like(batch["keep_image"])
    unconditional = {**batch, "keep_image": zeros, "keep_concat": zeros}
    if "text" in batch:
        unconditional["text"] = null_text.to(batch["text"]).expand_as(batch["text"])
    return unconditional


IMAGE = Task("image", 4, 0, _image, temporal=False)
TEXT_TO_VIDEO = Task("text-to-video", 4, 2, _text_to_video)
IMAGE_TO_VIDEO = Task("image-to-video", 8, 3, _image_to_video, pixels=True, one_token=True)
FRAME_INTERPOLATION = Task("frame-interpolation", 9, 3, _interpolation, learned_mask=True)
MULTIVIEW = Task("multiview", 8, 4, _multiview, pixels=True, one_token=True)
