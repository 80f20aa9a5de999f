"""Frame interpolation (§4.4, D.5)."""

from __future__ import annotations

import torch

from svd.diffusion.edm import expand
from svd.diffusion.guidance import Condition
from svd.latents.loader import Batch
from svd.model.autoencoder import Autoencoder
from svd.model.unet import UNet
from svd.tasks.base import Task
from svd.tasks.signals import text_ids


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


FRAME_INTERPOLATION = Task("frame-interpolation", 9, 3, _interpolation, learned_mask=True)
