"""Orbits around an object from one image (§4.5, D.6)."""

from __future__ import annotations

import torch

from svd.diffusion.guidance import Condition
from svd.latents.loader import Batch
from svd.model.autoencoder import Autoencoder
from svd.model.unet import UNet
from svd.tasks.base import Task
from svd.tasks.image_to_video import _from_image


def _multiview(batch: Batch, unet: UNet, autoencoder: Autoencoder | None) -> Condition:
    """As image-to-video, with the polar angle of the orbit; the last view is the conditioning one (§4.5, D.6)."""
    context, ids, concat = _from_image(batch, autoencoder, token=-1)
    polar = torch.deg2rad(90 - batch["elevation"])
    return Condition(context, torch.cat([ids, polar[:, None]], dim=1), concat)


MULTIVIEW = Task("multiview", 8, 4, _multiview, pixels=True, one_token=True)
