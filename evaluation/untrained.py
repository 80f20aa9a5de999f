"""A control of every evaluation: the same models with a network that has learned nothing."""

from __future__ import annotations

from dataclasses import replace

import torch

from svd.generation import Models
from svd.model.unet import UNet


def untrained(models: Models, seed: int) -> Models:
    """Return the same models with a U-Net of the same shape and random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(models.unet.config)
    return replace(models, unet=unet.to(models.device, models.dtype).eval())
