"""Test clips of a latent cache as evaluations of image-to-video and interpolation need them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evaluation.multiview.image_metrics import image_psnr
from svd.config import Phase
from svd.generation import Models
from svd.latents.cache import LatentCache
from svd.model.formats.folders import checkpoint_hash


@dataclass(frozen=True)
class CachedClips:
    """N test clips. pictures (N, 3, H, W): the first frames as they are. truth (N, T, 3, H, W): the clips as the
    autoencoder decodes them, which is the best that a model of its latents can make. All in [0, 1].

    fps, motion_buckets, cameras: of each clip, as the training was told.
    """

    ids: tuple[str, ...]
    pictures: Tensor
    truth: Tensor
    fps: tuple[float, ...]
    motion_buckets: tuple[float, ...]
    cameras: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.truth.shape[-2], self.truth.shape[-1]


@torch.no_grad()
def read_cached(inputs: Mapping[str, Path], models: Models, phase: Phase, count: int) -> CachedClips:
    """Read up to `count` test clips of the input `latents`, spread over all that can serve a phase.

    Raises UserError when there is none, when one is damaged, and for latents of another autoencoder than the input.
    """
    cache = LatentCache(inputs["latents"])
    cache.require_autoencoder(checkpoint_hash(inputs["autoencoder"]))
    rows = cache.rows(phase, "test")
    count = min(count, len(rows))
    samples = [cache.read(rows[i * len(rows) // count]) for i in range(count)]
    means = torch.stack([sample.moments[: phase.frames].chunk(2, dim=1)[0] for sample in samples])
    scaled = (means * cache.scaling_factor).to(models.device)
    return CachedClips(
        tuple(sample.row["sample_id"] for sample in samples),
        torch.stack([sample.frame for sample in samples]) / 2 + 0.5,
        models.decode(scaled, progress=False),
        tuple(float(sample.row["fps"]) for sample in samples),
        tuple(float(sample.row["motion_bucket"]) for sample in samples),
        tuple(str(sample.row["camera"]) for sample in samples),
    )


def psnr(images: Tensor, truth: Tensor) -> list[float]:
    """Return the PSNR in dB of each of N clips or images (N, …) in [0, 1]; at most 100."""
    planes = (values.movedim(-3, 1).flatten(2, -2) for values in (images, truth))  # the frames of a clip as one image
    return image_psnr(*planes).tolist()
