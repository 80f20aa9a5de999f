"""Scale and crop images to a size."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def cover(images: Tensor, height: int, width: int) -> Tensor:
    """Scale images (B, 3, h, w) in [0, 1] to cover height x width, antialiased, and crop the middle.

    For example 3 x 90 x 160 to 64 x 64: scaled to 64 x 114, then 25 columns cut off at both sides. Raises ValueError
    for another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"pictures must be (B, 3, h, w), got {tuple(images.shape)}")
    if images.shape[-2:] == (height, width):
        return images.float()
    factor = max(height / images.shape[-2], width / images.shape[-1])
    old = images.shape[-2:]
    size = [max(side, math.ceil(was * factor - 1e-6)) for was, side in zip(old, (height, width), strict=True)]
    scaled = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[..., top : top + height, left : left + width]
