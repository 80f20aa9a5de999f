"""An optional filter for unsuitable results: linear heads on CLIP embeddings of the frames, as in the released scripts.

No weights come with this project. The published heads (`p_head_v1.npz` and alike: arrays `weights` (C, E) and
`biases` (C,)) were trained on embeddings of OpenAI's ViT-L/14 and need that image tower.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import kornia
import numpy as np
import torch
from torch import Tensor

from svd.config import EncodersConfig
from svd.core.errors import UserError
from svd.model.encoders import ImageEncoder
from svd.model.formats.clip import load_released

_BLUR_SHARE = 4


@dataclass(frozen=True)
class SafetyFilter:
    """Logistic heads on CLIP embeddings, one per class: weights (C, E), biases (C,).

    A frame is flagged when any probability is above threshold.
    """

    image: ImageEncoder
    weights: Tensor
    biases: Tensor
    threshold: float = 0.5

    @torch.no_grad()
    def scores(self, frames: Tensor) -> Tensor:
        """Return (T,) the highest probability of any class, for frames (T, 3, H, W) in [0, 1]."""
        logits = self.image(frames * 2 - 1).float() @ self.weights.T + self.biases
        return logits.sigmoid().amax(1)

    def apply(self, clip: Tensor) -> tuple[Tensor, bool]:
        """Blur the clip (T, 3, H, W) beyond recognition when a frame is flagged; return it, and whether it was."""
        if float(self.scores(clip).max()) <= self.threshold:
            return clip, False
        return _blurred(clip), True


def _blurred(clip: Tensor) -> Tensor:
    sigma = min(clip.shape[-2:]) / _BLUR_SHARE
    # The kernel must be odd and fit twice into the image, because the border is reflected.
    size = min(clip.shape[-2:]) // 2 * 2 - 1
    return kornia.filters.gaussian_blur2d(clip, (size, size), (sigma, sigma))


def load_safety_filter(
    heads: Path, encoder: EncodersConfig, threshold: float = 0.5, device: torch.device | str = "cpu"
) -> SafetyFilter:
    """Load the heads (.npz) and the CLIP that they belong to (open_clip name or file, as in `encoders`).

    Raises UserError for a missing or broken file and for heads that don't fit the CLIP.
    """
    try:
        with np.load(heads, allow_pickle=False) as arrays:
            weights, biases = (np.atleast_1d(arrays[name]).astype(np.float32) for name in ("weights", "biases"))
    except FileNotFoundError:
        raise UserError(f"{heads}: no such file; give the .npz with the heads of the safety filter") from None
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{heads}: not an .npz with arrays 'weights' and 'biases' ({error})") from None
    image = ImageEncoder(load_released(encoder, device).visual).to(device).eval()
    weights = np.atleast_2d(weights)
    if weights.shape != (biases.size, image.width):
        raise UserError(
            f"{heads}: heads of shape {weights.shape} with {biases.size} biases don't fit {encoder.model}, which gives "
            f"{image.width} numbers; give the CLIP that they were trained on"
        )
    columns = torch.from_numpy(biases.reshape(-1)).to(device)
    return SafetyFilter(image, torch.from_numpy(weights).to(device), columns, threshold)
