"""Losses of the autoencoder: L1 + perceptual distance, KL, and a temporal patch discriminator (VideoLDM §3.1.1).

Legend: B clips, T frames, N = B·T images; images are in about [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svd.model.perceptual import Perceptual

LARGEST_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """PatchGAN of 3-D convolutions: it judges overlapping patches of several frames, so that it sees flicker.

    Pix2pix' layout (three strided layers, then two) with kernels (3, 4, 4); strides act on height and width alone.
    """

    def __init__(self, channels_in: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [min(width * 2**i, width * 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [self._conv(channels_in, width, 2), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(pairwise(widths)):
            parts += [self._conv(a, b, 2 if i < layers - 1 else 1, bias=False), nn.BatchNorm3d(b), nn.LeakyReLU(0.2)]
        parts.append(self._conv(widths[-1], 1, 1))
        self.layers = nn.Sequential(*parts)
        self.apply(self._initialise)

    @staticmethod
    def _conv(channels_in: int, channels_out: int, stride: int, bias: bool = True) -> nn.Conv3d:
        return nn.Conv3d(channels_in, channels_out, (3, 4, 4), (1, stride, stride), padding=1, bias=bias)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Conv3d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)

    def forward(self, frames_BTCHW: Tensor) -> Tensor:
        """Return logits (B, 1, T, H', W') of frames (B, T, 3, H, W); positive means real."""
        return self.layers(frames_BTCHW.transpose(1, 2))


def hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the discriminator's hinge loss."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Return the ratio of the two losses' gradient norms at the last layer, at most 1e4 (VQGAN Eq. 7), detached."""
    (first,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (second,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (first.norm() / (second.norm() + 1e-4)).clamp(0, LARGEST_WEIGHT).detach()


def kl_divergence(moments_BTCHW: Tensor) -> Tensor:
    """Return the KL of the posterior (B, T, 2C, h, w) from the unit normal in nats, a mean over frames."""
    average, logvar = moments_BTCHW.chunk(2, dim=2)
    return 0.5 * (average**2 + logvar.exp() - 1 - logvar).sum((2, 3, 4)).mean()


@dataclass(frozen=True)
class Reconstruction:
    """The parts of a reconstruction's loss."""

    l1: Tensor
    squared: Tensor
    perceptual: Tensor
    kl: Tensor
    total: Tensor


class ReconstructionLoss(nn.Module):
    """L1 + squared_weight · L2 + perceptual_weight · distance + kl_weight · KL, a mean over values.

    The reference sums over the 3·H·W values of an image; dividing all by this count keeps the ratio of the terms, so
    `kl_weight` means what it means there. perceptual_frames: how many images of a batch the perceptual distance sees,
    evenly spaced (0: all of them); its expectation is the same.

    The reference's loss is rec / exp(s) + s with a log-variance s, which is 0 and not trained by default; one of its
    example configurations trains it, and neither SVD nor VideoLDM says that the video decoder did. It is left out: a
    learned s ends at ln(rec), a common factor of the terms in rec. Adam doesn't see a common factor, the adaptive
    weight of the adversarial term takes it over, and beside the KL, which only the image phase has, it does what
    `kl_weight` does.
    """

    def __init__(
        self,
        perceptual: Perceptual | None,
        perceptual_weight: float,
        kl_weight: float,
        perceptual_frames: int = 0,
        squared_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.squared_weight = squared_weight
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.kl_weight = kl_weight
        self.perceptual_frames = perceptual_frames

    def forward(self, real_BTCHW: Tensor, fake_BTCHW: Tensor, moments: Tensor | None) -> Reconstruction:
        """Return the loss and its parts; moments (B, T, 2C, h, w): of the posterior, when the encoder learns."""
        l1 = (real_BTCHW - fake_BTCHW).abs().mean()
        squared = (real_BTCHW - fake_BTCHW).square().mean()
        distance = self._distance(real_BTCHW.flatten(0, 1), fake_BTCHW.flatten(0, 1))
        values = real_BTCHW[0, 0].numel()
        kl = l1.new_zeros(()) if moments is None else kl_divergence(moments)
        total = l1 + self.squared_weight * squared + self.perceptual_weight * distance + self.kl_weight * kl / values
        return Reconstruction(l1, squared, distance, kl, total)

    def _distance(self, real_NCHW: Tensor, fake_NCHW: Tensor) -> Tensor:
        if self.perceptual is None or self.perceptual_weight == 0:
            return real_NCHW.new_zeros(())
        count = self.perceptual_frames or len(real_NCHW)
        step = max(1, len(real_NCHW) // count)
        return self.perceptual(real_NCHW[::step], fake_NCHW[::step]).mean()


def reconstruction_psnr(real: Tensor, fake: Tensor) -> float:
    """Return the mean peak signal-to-noise ratio in dB of images (N, 3, H, W) in [-1, 1]; `fake` is clamped to that."""
    error = ((real - fake.clamp(-1, 1)) / 2).square().mean((1, 2, 3)).clamp_min(1e-10)
    return float((-10 * error.log10()).mean())


def flicker(real_BTCHW: Tensor, fake_BTCHW: Tensor) -> float:
    """Return the mean absolute error of the changes from frame to frame, in [-1, 1] units."""
    return float((real_BTCHW.diff(dim=1) - fake_BTCHW.diff(dim=1)).abs().mean())
