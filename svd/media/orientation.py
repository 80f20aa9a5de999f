"""How a coded picture becomes the one that players show: the eight orientations of a display matrix.

Phones write the matrix instead of turning pictures, and some cameras towards the user mirror with it as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[Any]


@dataclass(frozen=True)
class Orientation:
    """Turned clockwise by `rotation` degrees (0, 90, 180 or 270), after that `mirrored` left to right or not."""

    rotation: int = 0
    mirrored: bool = False

    @property
    def sideways(self) -> bool:
        """Whether width and height change places."""
        return self.rotation % 180 != 0

    def upright(self, picture: Picture) -> Picture:
        """A coded picture (H, W, …) as it is shown; itself where nothing changes."""
        if self == UPRIGHT:
            return picture
        turned = np.rot90(picture, -self.rotation // 90)
        return np.ascontiguousarray(turned[:, ::-1] if self.mirrored else turned)

    def upright_motion(self, dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Displacements in the coded picture as they are seen in the shown one."""
        x, y = {0: (dx, dy), 90: (-dy, dx), 180: (-dx, -dy), 270: (dy, -dx)}[self.rotation]
        return -x if self.mirrored else x, y

    def filters(self) -> list[tuple[str, str]]:
        """The same as filters of FFmpeg, each with its arguments."""
        return [("transpose", "clock")] * (self.rotation // 90) + [("hflip", "")] * self.mirrored


UPRIGHT = Orientation()


def from_matrix(matrix: np.ndarray) -> Orientation:
    """The orientation nearest to a display matrix of nine numbers (FFmpeg's order, a b u c d v x y w).

    A point (p, q) of the coded picture is shown at (a p + c q, b p + d q). Without a direction, as in a broken header
    that is all zeros, nothing is turned.
    """
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    mirrored = a * d - b * c < 0
    right = (-a if mirrored else a), b  # where the picture's right side points before the mirror
    if right == (0, 0):
        return UPRIGHT
    return Orientation(round(math.atan2(right[1], right[0]) / (math.pi / 2)) * 90 % 360, mirrored)


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """What the decoder says of a frame; of most, nothing."""
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV lists no side data at all beside a kind that it has no name for, such as EXIF: a mirror goes unseen then.
        turned = frame.rotation
        return Orientation(-round(turned / 90) * 90 % 360) if abs(turned) <= 180 else UPRIGHT
    return UPRIGHT if matrix is None else from_matrix(np.frombuffer(matrix, np.int32))


def upright_rgb(frames: Iterable[av.VideoFrame], wanted: Iterable[int] | None = None) -> Iterator[tuple[int, Picture]]:
    """The decoded frames as players show them, (H, W, 3) uint8 RGB with their numbers: all, or the `wanted` ones.

    The first frame's orientation holds for all. Frames behind the last wanted one are not decoded.
    """
    chosen = None if wanted is None else set(wanted)
    last = None if chosen is None else max(chosen)
    orientation: Orientation | None = None
    for number, frame in enumerate(frames):
        orientation = orientation or orientation_of(frame)
        if chosen is None or number in chosen:
            yield number, orientation.upright(frame.to_ndarray(format="rgb24"))
        if number == last:
            return
