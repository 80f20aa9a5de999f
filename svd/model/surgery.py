"""Changing a U-Net's shape while keeping what it computes: wider input, temporal layers (§2, D.4, D.5)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from svd.model.checkpoint import Lazy, check_fit
from svd.model.unet import UNet
from svd.stage import UserError

# What only a video U-Net has; everything else comes from the image model.
TEMPORAL = re.compile(r"temporal_|time_mixer|time_pos_embed|add_embedding|mask_latent")


def widen_conv_in(state: Mapping[str, Lazy], in_channels: int) -> dict[str, Lazy]:
    """The same U-Net with more input channels, their weights zero: 4 → 8 (image-to-video), 8 → 9 (interpolation).

    The output doesn't change whatever the new channels hold. Raises UserError when the model has more channels already.
    """
    name = "conv_in.weight"
    conv = state[name]
    have = conv.shape[1]
    if have > in_channels:
        raise UserError(f"{name} has {have} input channels, more than the {in_channels} asked for")
    if have == in_channels:
        return dict(state)

    def widen(weight: Tensor) -> Tensor:
        extra = weight.new_zeros(weight.shape[0], in_channels - have, *weight.shape[2:])
        return torch.cat([weight, extra], dim=1)

    return {**state, name: conv.map(widen)}


def video_names(state: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Names of an image U-Net's tensors in the video U-Net: residual blocks are one level deeper."""
    if any(".spatial_res_block." in name for name in state):
        return dict(state)
    return {re.sub(r"(resnets\.\d+)\.", r"\1.spatial_res_block.", name): tensor for name, tensor in state.items()}


def inflate(image_state: Mapping[str, Lazy], video: UNet) -> UNet:
    """Put an image U-Net's tensors into a video U-Net, whose temporal layers keep their fresh values (§2, D.2).

    In image mode the result computes what the image model does; temporal residual blocks start as the identity anyway.
    The input is widened with zeros when the video model takes more channels. Raises UserError, before anything is
    changed, when tensors are missing, unexpected or misshaped.
    """
    given = widen_conv_in(video_names(image_state), video.config.in_channels)
    state = video.state_dict()
    spatial = {name: tuple(value.shape) for name, value in state.items() if not TEMPORAL.search(name)}
    check_fit(spatial, given, "the image U-Net doesn't fit the video U-Net")
    with torch.no_grad():
        for name in spatial:
            state[name].copy_(given[name].load())
    return video
