"""CRAFT, the text detector of the paper (App. C): Baek et al., "Character Region Awareness for Text Detection" (2019).

A VGG-16 with batch normalisation and a U-shaped decoder predicts two maps at half size: the probability that a pixel is
the centre of a character (region), and that it is the centre of a gap between characters of a word (affinity). Module
names are those of the published weights (`craft_mlt_25k.pth`), so these load unchanged.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svd.core.device import memory_errors, pick_device
from svd.core.errors import UserError
from svd.curation.text.base import MEAN, MULTIPLE, STD

TEXT_THRESHOLD = 0.7
LOW_TEXT = 0.4
LINK_THRESHOLD = 0.4
MIN_PIXELS = 10
MAGNIFICATION = 1.5
_LOADING = threading.Lock()
# VGG-16-BN convolutions as torchvision numbers its layers: (first layer of the slice, channels; 0 is a pooling).
_SLICES = {
    "slice1": (0, (3, 64, 64, 0, 128, 128)),
    "slice2": (12, (128, 0, 256, 256)),
    "slice3": (19, (256, 256, 0, 512, 512)),
    "slice4": (29, (512, 512, 0, 512, 512)),
}


def _slice(name: str) -> nn.Sequential:
    """Build a part of VGG-16-BN whose children keep torchvision's numbers.

    CRAFT splits the network after a batch normalisation, so slices 2 to 4 start with its activation.
    """
    first, widths = _SLICES[name]
    part = nn.Sequential()
    number, channels = first, widths[0]
    if number:
        part.add_module(str(number), nn.ReLU())
        number += 1
    for index, width in enumerate(widths[1:], start=1):
        if width == 0:
            part.add_module(str(number), nn.MaxPool2d(2, 2))
            number += 1
            continue
        part.add_module(str(number), nn.Conv2d(channels, width, 3, padding=1))
        part.add_module(str(number + 1), nn.BatchNorm2d(width))
        number, channels = number + 2, width
        if index < len(widths) - 1:
            part.add_module(str(number), nn.ReLU())
            number += 1
    return part


class CraftBackbone(nn.Module):
    """VGG-16-BN up to conv5, followed by the dilated fc6 and fc7 of SSD."""

    def __init__(self) -> None:
        super().__init__()
        self.slice1, self.slice2, self.slice3, self.slice4 = (_slice(name) for name in _SLICES)
        self.slice5 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to features at 1/2, 1/4, 1/8 and 1/16 of the size, and fc7 at 1/16."""
        features = []
        for part in (self.slice1, self.slice2, self.slice3):
            x = part(x)
            # The published network activates in place in the next slice, so its decoder sees activated features.
            features.append(torch.relu(x))
        x = self.slice4(x)
        return [*features, x, self.slice5(x)]


class DoubleConv(nn.Module):
    """A 1×1 and a 3×3 convolution of the decoder."""

    def __init__(self, below: int, middle: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(below + middle, middle, 1), nn.BatchNorm2d(middle), nn.ReLU()),
            *(nn.Conv2d(middle, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, below + middle, H, W) to (B, out, H, W)."""
        return self.conv(x)


class Craft(nn.Module):
    """The network: (B, 3, H, W) normalised RGB → (B, H/2, W/2, 2), region and affinity."""

    def __init__(self) -> None:
        super().__init__()
        self.basenet = CraftBackbone()
        self.upconv1 = DoubleConv(1024, 512, 256)
        self.upconv2 = DoubleConv(512, 256, 128)
        self.upconv3 = DoubleConv(256, 128, 64)
        self.upconv4 = DoubleConv(128, 64, 32)
        self.conv_cls = nn.Sequential(
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, H/2, W/2, 2)."""
        half, quarter, eighth, sixteenth, deep = self.basenet(x)
        y = self.upconv1(torch.cat([deep, sixteenth], 1))
        for finer, step in ((eighth, self.upconv2), (quarter, self.upconv3), (half, self.upconv4)):
            y = F.interpolate(y, size=finer.shape[2:], mode="bilinear", align_corners=False)
            y = step(torch.cat([y, finer], 1))
        return self.conv_cls(y).permute(0, 2, 3, 1)


def load_craft(path: Path) -> Craft:
    """Load the published weights; raises UserError when the file is missing or isn't CRAFT."""
    if not path.is_file():
        raise UserError(f"curation.text.craft_weights: '{path}' does not exist; clovaai publishes craft_mlt_25k.pth")
    model = Craft()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    except Exception as error:
        # A broken file can make torch.load raise almost anything.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"curation.text.craft_weights: '{path}' is not CRAFT: {reason}") from None
    return model.eval()


@functools.cache
def _shared(path: Path, device: str, _changed: int) -> Craft:
    return load_craft(path).to(device)


def shared_craft(path: Path, device: str) -> Craft:
    """Load CRAFT on `device` once per process, for all threads; a changed file is loaded again."""
    with _LOADING:
        return _shared(path, device, path.stat().st_mtime_ns if path.is_file() else 0)


class CraftTextDetector:
    """Detects words by CRAFT: its maps are thresholded, joined through affinity, and boxed."""

    def __init__(self, weights: Path, long_side: int = 1280, device: str | None = None) -> None:
        self.device = device or pick_device()
        self.model = shared_craft(weights, self.device)
        self.long_side = long_side

    @torch.inference_mode()
    def polygons(self, frame: np.ndarray) -> list[np.ndarray]:
        """Return word boxes (4, 2) in pixels of an (H, W, 3) uint8 RGB frame. Raises MemoryError."""
        height, width = frame.shape[:2]
        ratio = min(MAGNIFICATION, self.long_side / max(height, width))
        size = [max(1, round(side * ratio)) for side in (height, width)]
        padded = [-(-side // MULTIPLE) * MULTIPLE for side in size]
        canvas = np.zeros((*padded, 3), np.float32)
        canvas[: size[0], : size[1]] = cv2.resize(frame, size[::-1], interpolation=cv2.INTER_LINEAR)
        pixels = torch.from_numpy((canvas / 255 - MEAN) / STD).permute(2, 0, 1)[None]
        with memory_errors():
            maps = self.model(pixels.to(self.device).float())[0].float().cpu().numpy()
        scale = np.array([2 * width / size[1], 2 * height / size[0]])
        return [box * scale for box in word_boxes(maps[..., 0], maps[..., 1])]


def word_boxes(region: np.ndarray, affinity: np.ndarray) -> list[np.ndarray]:
    """Return rotated boxes (4, 2) of the words in the two maps (h, w), in map pixels: the paper's post-processing."""
    characters, links = region > LOW_TEXT, affinity > LINK_THRESHOLD
    joined = (characters | links).astype(np.uint8)
    count, labels, facts, _ = cv2.connectedComponentsWithStats(joined, connectivity=4)
    found = []
    for label in range(1, count):
        area = facts[label, cv2.CC_STAT_AREA]
        inside = labels == label
        if area < MIN_PIXELS or region[inside].max() < TEXT_THRESHOLD:
            continue
        found.append(_box(inside & ~(links & ~characters), facts[label]))
    return found


def _box(word: np.ndarray, facts: Sequence[int]) -> np.ndarray:
    """Return the rotated rectangle around a word, grown by what thresholding the region map has removed."""
    _, _, width, height, area = (int(value) for value in facts)
    growth = int(np.sqrt(area * min(width, height) / (width * height)) * 2)
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (1 + growth, 1 + growth))
    grown = cv2.dilate(np.pad(word.astype(np.uint8), growth), kernel)
    rows, columns = np.nonzero(grown)
    points = np.stack([columns, rows], 1).astype(np.int32) - growth
    return cv2.boxPoints(cv2.minAreaRect(points))
