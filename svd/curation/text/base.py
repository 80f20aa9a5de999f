"""The interface of text detectors, and the area of text in frames (App. C, Fig. 15)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import shapely

MULTIPLE = 32  # sides of the detectors' inputs
# ImageNet's statistics of RGB in [0, 1], with which the detectors were trained.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


class TextDetector(Protocol):
    """Detects written text in a frame."""

    def polygons(self, frame: np.ndarray) -> list[np.ndarray]:
        """Return a polygon (N, 2) in pixels (x, y) per text line of an (H, W, 3) uint8 RGB frame."""


def area_ratio(polygons: Sequence[np.ndarray], height: int, width: int) -> float:
    """Return the area of the union of the polygons (N, 2) inside the frame, as a share of the frame in [0, 1].

    A sum over boxes would count overlaps twice and could exceed 1.
    """
    if not polygons:
        return 0.0
    shapes = shapely.make_valid(shapely.polygons([np.asarray(p, np.float64) for p in polygons]))
    inside = shapely.intersection(shapely.union_all(shapes), shapely.box(0, 0, width, height))
    return float(inside.area) / (height * width)


def text_areas(frames: Sequence[np.ndarray], detector: TextDetector) -> list[float]:
    """Return the share of each (H, W, 3) uint8 RGB frame that text covers."""
    return [area_ratio(detector.polygons(frame), *frame.shape[:2]) for frame in frames]
