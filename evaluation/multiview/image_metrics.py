"""Metrics of images against true images (§4.5, Fig. 10): PSNR, SSIM, perceptual distance, CLIP-S.

Images are (N, 3, H, W) float32 in [0, 1], composited on white; every function gives one number per image. A perceptual
distance carries the name of its network: `lpips_alex` and `lpips_vgg` need the published LPIPS weights, `stlpips_*` is
the shift-tolerant variant whose weights are installed with this package. These are different metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from svd.core.errors import UserError
from svd.model.encoders import Encoders
from svd.model.perceptual import Perceptual

Kind = Literal["lpips-alex", "lpips-vgg", "stlpips-alex", "stlpips-vgg"]

PSNR_CAP = 100.0  # decibels, for equal images
_WHITE = 245 / 255
_AT_ONCE = 32


def image_psnr(images: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (N,), at most 100.

    mask: (N, H, W) bool, the pixels that count; an image with an empty mask counts as equal.
    """
    square = (images - truth).square().mean(1)
    weight = torch.ones_like(square) if mask is None else mask.to(square.dtype)
    error = (square * weight).sum((1, 2)) / weight.sum((1, 2)).clamp_min(1)
    return (-10 * error.clamp_min(1e-12).log10()).clamp_max(PSNR_CAP)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity (N,) of Wang et al. 2004.

    The window is an 11 x 11 Gaussian of standard deviation 1.5; channels are averaged.
    """
    place = torch.arange(11, dtype=torch.float32, device=images.device) - 5
    line = torch.exp(-place.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)

    def local(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    mean_a, mean_b = local(images), local(truth)
    var_a = local(images.square()) - mean_a.square()
    var_b = local(truth.square()) - mean_b.square()
    covariance = local(images * truth) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)
    return (top / bottom).mean((1, 2, 3))


def silhouette(images: Tensor) -> Tensor:
    """Return where an object covers the white background, (N, H, W) bool: a channel is darker than 245 of 255."""
    return images.amin(1) < _WHITE


def silhouette_iou(images: Tensor, truth: Tensor) -> Tensor:
    """Return the intersection over union of the silhouettes, (N,); 1 when both are empty."""
    a, b = silhouette(images), silhouette(truth)
    union = (a | b).sum((1, 2))
    return torch.where(union > 0, (a & b).sum((1, 2)) / union.clamp_min(1), 1.0)


class Perceptor:
    """A perceptual distance by name.

    weights: for `lpips-*`, a file or folder with torchvision's backbone and the linear layers of the LPIPS release.
    Raises UserError when they are missing or don't fit.
    """

    def __init__(self, kind: Kind, weights: str | None = None, device: torch.device | str = "cpu") -> None:
        self.name = kind.replace("-", "_")
        self.weights = "stlpips-pytorch 0.0.2 (shift-tolerant LPIPS)" if kind.startswith("st") else "LPIPS v0.1"
        self._network = Perceptual(kind, _weight_files(kind, weights)).to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return the distance (N,) of images of at least 32 x 32 pixels."""
        pairs = zip(images.split(_AT_ONCE), truth.split(_AT_ONCE), strict=True)
        return torch.cat(
            [self._network((2 * a - 1).to(self._device), (2 * b - 1).to(self._device)).cpu() for a, b in pairs]
        )


def _weight_files(kind: Kind, weights: str | None) -> list[Path]:
    if kind.startswith("st"):
        return []
    advice = (
        "evaluation.multiview.lpips_weights must name a file or folder with torchvision's backbone "
        "and github.com/richzhang/PerceptualSimilarity's weights v0.1; or choose 'stlpips-alex', which is installed"
    )
    if weights is None:
        raise UserError(f"{kind} needs its published weights: {advice}")
    path = Path(weights).expanduser()
    files = sorted(p for p in path.iterdir() if p.suffix in (".pth", ".safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"{path}: no LPIPS weights there; {advice}")
    return files


@torch.no_grad()
def image_features(encoders: Encoders, images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return unit image embeddings (N, E) for CLIP-S."""
    parts = [encoders.image_features((2 * part - 1).to(device)).cpu() for part in images.split(_AT_ONCE)]
    return torch.cat(parts)


def clip_similarity(features: Tensor, truth: Tensor) -> Tensor:
    """Return CLIP-S (N,): the cosine of the embeddings of corresponding images (§4.5)."""
    return (features * truth).sum(1)
