"""Tests of a candidate on the tiny images around it: is it a transition, and where does it begin and end?

In a dissolve every frame is a mix (1 − α) A + α B of the shots on both sides. Projected on the line from A to B, α
rises from 0 to 1 along a ramp, and little is left beside the line. Motion within a shot leaves the line by about 0.87
of its length, a wipe by 0.5. A hard cut is a step. A fade is the same ramp to or from black.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

MAX_RAMP_ERROR = 0.12  # root mean square of α against the ramp
MAX_OFF_LINE = 0.62  # distance from the line, in lengths of the line
MIN_DISTANCE = 5.0  # grey levels, root mean square
SAME_SCENE = 0.8  # least correlation of two images of one shot
SAME_SCENE_SLOWLY = 0.6  # the same, for images far enough apart that the content has moved
MIN_UNEXPLAINED = 0.1  # share of the change along a transition that motion does not explain
MAX_FLOW_STEPS = 16
_NO_FLOW: Any = None
# A blank image has a standard deviation below this, and a mean beyond one of these levels.
UNIFORM_SPREAD = 6.0
BLACK_LEVEL, WHITE_LEVEL = 40.0, 215.0


@dataclass(frozen=True)
class Ramp:
    """A fitted transition: frames [start, end) are mixes, counted from the first image; empty for a step at `end`.

    error: root mean square of α against the ramp. off_line: distance from the line within the ramp, in lengths of the
    line. distance: grey levels between both ends. similarity: correlation of both ends.
    """

    start: int
    end: int
    error: float
    off_line: float
    distance: float
    similarity: float

    @property
    def is_transition(self) -> bool:
        """Say whether both sides are different shots and the frames between are mixes of them."""
        return (
            self.distance >= MIN_DISTANCE
            and self.similarity < (SAME_SCENE_SLOWLY if self.end - self.start > 2 else SAME_SCENE)
            and self.error <= MAX_RAMP_ERROR
            and self.off_line <= MAX_OFF_LINE
        )


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Pearson correlation of two images given as vectors; 0 when one of them is uniform."""
    a, b = one - one.mean(), other - other.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 1e-3 * len(a) else 0.0


def same_scene(one: np.ndarray, other: np.ndarray, pixels: int, least: float = SAME_SCENE) -> bool:
    """Say whether two tiny images (first `pixels` values: luma) show the same shot; least: least correlation."""
    a, b = one.astype(np.float32), other.astype(np.float32)
    if float(np.abs(a - b).mean()) < 3:
        return True
    return correlation(a[:pixels], b[:pixels]) > least and float(np.abs(a[pixels:] - b[pixels:]).mean()) < 8


def fit_ramp(images: np.ndarray, pixels: int, numbers: np.ndarray | None = None) -> Ramp | None:
    """Fit the transition between the first and the last of (n, d) images; None when n < 4 or both are equal.

    numbers: frame number of each image, ascending; None: 0, 1, 2, …. Between unevenly spaced images steady motion would
    look like a ramp without them.
    """
    count = len(images)
    if count < 4:
        return None
    x = images.astype(np.float32)
    line = x[-1] - x[0]
    length = float(line @ line)
    if length < 1e-6:
        return None
    moved = x - x[0]
    alpha = moved @ line / length
    beside = np.maximum((moved * moved).sum(1) / length - alpha**2, 0)
    steps = np.arange(count) if numbers is None else numbers - numbers[0]
    start, end = _ends(alpha, steps)
    ideal = np.clip((steps - start) / max(end - start, 1e-6), 0, 1)
    first, last = (int(i) for i in np.searchsorted(steps, (round(start) + 1, round(end))))
    inside = beside[first:last] if last > first else np.zeros(1)
    return Ramp(
        start=min(first, last),
        end=last,
        error=float(np.sqrt(((alpha - ideal) ** 2).mean())),
        off_line=float(np.sqrt(inside.mean())),
        distance=float(np.sqrt(length / x.shape[1])),
        similarity=correlation(x[0, :pixels], x[-1, :pixels]),
    )


def unexplained(luma: np.ndarray) -> float:
    """Return which share of the change from the first to the last of (n, h, w) images motion does not explain.

    Each image is warped onto the next by optical flow; the rest is projected on the whole change. Near 1 the image was
    exchanged, as in a dissolve; near 0 it moved.
    """
    count, height, width = luma.shape
    steps = luma[np.unique(np.linspace(0, count - 1, min(count, MAX_FLOW_STEPS + 1)).round().astype(int))]
    line = (steps[-1].astype(np.float32) - steps[0]).ravel()
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    total = 0.0
    for one, other in itertools.pairwise(steps):
        flow = cv2.calcOpticalFlowFarneback(other, one, _NO_FLOW, 0.5, 2, 9, 2, 5, 1.1, 0)
        moved = cv2.remap(one, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        total += float((other.astype(np.float32) - moved).ravel() @ line)
    return total / max(float(line @ line), 1e-6)


def _ends(alpha: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """Return where α leaves 0 and where it reaches 1, from its crossings of 1/8 and 7/8, in the units of `steps`."""
    high = int(np.argmax(alpha >= 0.875))
    low = int(np.flatnonzero(alpha[: high + 1] <= 0.125)[-1])
    if high - low <= 1:
        return float(steps[low]), float(steps[high])
    rise = _crossing(alpha, steps, low, 0.125), _crossing(alpha, steps, high - 1, 0.875)
    stretch = (rise[1] - rise[0]) / 6
    return max(rise[0] - stretch, 0.0), min(rise[1] + stretch, float(steps[-1]))


def _crossing(alpha: np.ndarray, steps: np.ndarray, index: int, level: float) -> float:
    """Return where α crosses a level between two images, interpolated linearly."""
    rise, width = float(alpha[index + 1] - alpha[index]), float(steps[index + 1] - steps[index])
    return float(steps[index]) + ((level - float(alpha[index])) / rise * width if rise > 0 else 0.0)


def are_blank(luma: np.ndarray) -> np.ndarray:
    """Say which of (n, pixels) uint8 luma images are almost uniformly black or white, (n,) bool."""
    mean = luma.mean(1)
    blank = (mean < BLACK_LEVEL) | (mean > WHITE_LEVEL)
    blank[blank] = luma[blank].std(1) < UNIFORM_SPREAD
    return blank


def fade_start(images: np.ndarray, pixels: int) -> int:
    """Return the first frame of a fade to the blank last of (n, d) images that begin within the shot; n - 1: no fade.

    Along a fade contrast falls steadily: going back from the blank frame, it rises until the fade began.
    """
    contrast = images[:, :pixels].astype(np.float32).std(1)
    index = len(contrast) - 1
    while index > 0 and contrast[index - 1] > contrast[index] + max(0.006 * float(contrast[index]), 0.05):
        index -= 1
    drop = float(contrast[index] - contrast[-1])
    steps = np.diff(contrast[index:])
    # One jump that makes up most of the drop is a cut into black.
    if len(steps) < 2 or drop < 1 or float(-steps.min()) > 0.6 * drop:
        return len(contrast) - 1
    return index + 1
