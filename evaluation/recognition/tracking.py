"""What an even shape of a known colour does in a clip, by where it is in each frame.

A learned judge goes by whatever goes along with an answer in its training clips, such as the side that a shape is on;
the displacement of the shape can't be taken for anything else. It needs shapes of one colour, as the plain worlds have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svd.media.video import Frames
from svd.synthetic.drawing import COLOURS

DIRECTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
ACTIONS = frozenset({*DIRECTIONS, "standing still"})  # what can be told apart
MOVED = 0.06  # heights of the frame; a shape that gets less far stands still
SPREAD, FAINT = 60.0, 0.3  # of the distance from the colour, in RGB levels; nearness that no longer counts


@dataclass(frozen=True)
class ShapePath:
    """Where a shape is in each frame, (T, 2) in heights from the middle, y down, and its area (T,) in pixels."""

    places: np.ndarray
    areas: np.ndarray

    @property
    def way(self) -> np.ndarray:
        """How far it gets from the first two frames to the last two, (2,) in heights."""
        moved: np.ndarray = self.places[-2:].mean(0) - self.places[:2].mean(0)
        return moved

    @property
    def growth(self) -> float:
        """The logarithm of how many times as large it becomes."""
        return float(np.log(max(self.areas[-2:].mean(), 1.0) / max(self.areas[:2].mean(), 1.0)))


def find_path(frames: Frames, colour: str) -> ShapePath:
    """Track what is of a colour, one of `COLOURS`, through a clip (T, H, W, 3) uint8."""
    near = np.exp(-((frames - np.array(COLOURS[colour], np.float64)) ** 2).sum(-1) / (2 * SPREAD**2))
    near[near < FAINT] = 0
    height, width = near.shape[1:]
    areas = near.sum((1, 2))
    rows, columns = np.mgrid[:height, :width]
    sums = np.stack([(near * (columns + 0.5)).sum((1, 2)), (near * (rows + 0.5)).sum((1, 2))], 1)
    middle = np.array([width, height]) / 2 / height
    return ShapePath(sums / np.maximum(areas, 1e-6)[:, None] / height - middle, areas)


def action_of(path: ShapePath, camera: str) -> str:
    """Return the action that a path shows before a camera that does `camera`: the nearest direction, or none.

    Before a camera that moves, a shape that crosses the frame stands still: plain scenes have one motion each. A shape
    that isn't there at the beginning or at the end does nothing that can be named.

    >>> there = ShapePath(np.array([[-0.2, 0], [-0.1, 0], [0.1, 0.02], [0.2, 0]]), np.full(4, 80.0))
    >>> action_of(there, "object-motion"), action_of(there, "pan-left")
    ('moving right', 'standing still')
    """
    if min(path.areas[:2].max(), path.areas[-2:].max()) < 1:
        return "no shape"
    if camera not in ("static", "object-motion") or np.hypot(*path.way) < MOVED:
        return "standing still"
    return max(DIRECTIONS, key=lambda name: float(path.way @ np.array(DIRECTIONS[name])))
