"""Image to video (§4.2, D.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from svd.diffusion.edm import expand
from svd.diffusion.guidance import Condition
from svd.latents.loader import Batch
from svd.model.autoencoder import Autoencoder, mean
from svd.model.unet import UNet
from svd.tasks.base import Task
from svd.tasks.signals import text_ids


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


IMAGE_TO_VIDEO = Task("image-to-video", 8, 3, _image_to_video, pixels=True, one_token=True)
