"""The eight orientations of a display matrix.

Phones write the matrix instead of rotating the frames, and some front cameras also mirror with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[Any]


@dataclass(frozen=True)
class Orientation:
    """A clockwise rotation by `rotation` degrees (0, 90, 180 or 270), then a mirroring left to right if `mirrored`."""

    rotation: int = 0
    mirrored: bool = False

    @property
    def sideways(self) -> bool:
        """Whether width and height are swapped."""
        return self.rotation % 180 != 0

    def upright(self, frame: Frame) -> Frame:
        """Return a coded frame (H, W, …) as it is shown; the same array where nothing changes."""
        if self == UPRIGHT:
            return frame
        rotated = np.rot90(frame, -self.rotation // 90)
        return np.ascontiguousarray(rotated[:, ::-1] if self.mirrored else rotated)

    def upright_motion(self, dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Convert displacements (dx, dy) in the coded frame to those in the shown one."""
        x, y = {0: (dx, dy), 90: (-dy, dx), 180: (-dx, -dy), 270: (dy, -dx)}[self.rotation]
        return -x if self.mirrored else x, y

    def filters(self) -> list[tuple[str, str]]:
        """Return FFmpeg's filters that do the same, as pairs of name and arguments."""
        return [("transpose", "clock")] * (self.rotation // 90) + [("hflip", "")] * self.mirrored


UPRIGHT = Orientation()


def from_matrix(matrix: np.ndarray) -> Orientation:
    """Return the orientation nearest to a display matrix of nine numbers (FFmpeg's order, a b u c d v x y w).

    A point (p, q) of the coded frame is shown at (a p + c q, b p + d q). A matrix without a direction, as in a broken
    header that is all zeros, gives UPRIGHT.
    """
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    mirrored = a * d - b * c < 0
    right = (-a if mirrored else a), b  # where the frame's right side points before the mirroring
    if right == (0, 0):
        return UPRIGHT
    return Orientation(round(math.atan2(right[1], right[0]) / (math.pi / 2)) * 90 % 360, mirrored)


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """Return the orientation from the frame's display matrix; UPRIGHT if it has none."""
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV lists no side data when one kind among it, such as EXIF, has no name there. Only the rotation is left.
        angle = frame.rotation
        return Orientation(-round(angle / 90) * 90 % 360) if abs(angle) <= 180 else UPRIGHT
    return UPRIGHT if matrix is None else from_matrix(np.frombuffer(matrix, np.int32))
