"""Sharpness, exposure and bars of a clip, from its first, middle and last frame.

frames: (N, H, W, 3) uint8 RGB. All but `bars` look at the picture between letterbox and pillarbox bars. Each score is
the median of the frames, so that a fade at one end doesn't decide.
"""

from __future__ import annotations

import cv2
import numpy as np

SHARPNESS_SIDE = 256  # pixels of the shorter side: a large blurred picture is not sharper than a small clear one
BLACK, WHITE = 4, 251  # 8-bit luma at and beyond which nothing can be told apart
BAR_LUMA = 12  # 8-bit; black bars have up to this with what coding adds
BAR_SPECKS = 0.01  # share of a line of a bar that may be brighter


def sharpness(frames: np.ndarray) -> float:
    """Return the variance of the Laplacian of luma, at a shorter side of SHARPNESS_SIDE pixels."""
    laplacians = [cv2.Laplacian(_at_fixed_size(plane), cv2.CV_16S) for plane in _picture(frames)]
    return float(np.median([cv2.meanStdDev(one)[1] ** 2 for one in laplacians]))


def mean_luma(frames: np.ndarray) -> float:
    """Return the mean luma, 0 (black) to 1 (white)."""
    return float(np.median([plane.mean() / 255 for plane in _picture(frames)]))


def clipped(frames: np.ndarray) -> float:
    """Return the share of pixels that are as good as black or white, 0 to 1."""
    return float(np.median([((plane <= BLACK) | (plane >= WHITE)).mean() for plane in _picture(frames)]))


def bars(frames: np.ndarray) -> float:
    """Return the share of the frame outside the picture: lines at its edges that are black in all frames."""
    planes = _picture(frames)
    return 1 - planes[0].size / (frames.shape[1] * frames.shape[2])


def _picture(frames: np.ndarray) -> np.ndarray:
    """Return the luma (N, h, w) between the bars; all of it where every line is black."""
    planes = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
    bright = planes.max(axis=0) > BAR_LUMA
    rows, columns = (np.flatnonzero(bright.mean(axis=axis) > BAR_SPECKS) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return planes
    return planes[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _at_fixed_size(plane: np.ndarray) -> np.ndarray:
    scale = SHARPNESS_SIDE / min(plane.shape)
    width, height = (max(1, round(side * scale)) for side in plane.shape[::-1])
    return cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
