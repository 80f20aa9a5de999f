"""Which frames the decode pass leaves out: pictures that no other picture refers to, as long as enough remain.

About half of the frames of a usual H.264 stream are B-frames that nothing depends on; without them decoding costs
two thirds. Which packets hold them is known before decoding from the order of the timestamps alone. Frames that
are sampled for motion, text and similarity are never left out, so samples are those of a full decode; where a cut
may hide between two frames, those between are decoded after all (cuts.CutFinder).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from svd.curation.decoding.probe import PacketIndex

# Decoders that leave out single pictures without side effects; others decode everything.
SKIPPING_CODECS = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4")
MAX_SECONDS = 0.17
# Frames decoded once more may be this share of those before, beyond the first AGAIN_FREE; above it nothing is skipped.
AGAIN_SHARE = 0.25
AGAIN_FREE = 60


def skippable(index: PacketIndex, gap: int, sampled: Iterable[int]) -> np.ndarray:
    """Timestamps of the frames that the decoder may leave out, ascending.

    Only reordered frames after the first keyframe are left out, none of `sampled` (timestamps), and so that decoded
    frames are at most `gap` frames and MAX_SECONDS apart. The decoder still decodes those that others refer to.
    """
    if gap < 2 or not index.trusted:
        return np.zeros(0, np.int64)
    shown = index.shown()
    before = np.maximum.accumulate(index.pts)
    late = index.pts[(index.pts < before) & ~index.keyframe & ~index.discarded]
    first = index.pts[index.keyframe][:1]
    late = np.sort(late[late > first]) if len(first) else late[:0]
    reordered = np.isin(shown, late, assume_unique=True)
    keep = np.fromiter(_spread(np.flatnonzero(~reordered), gap), np.int64)
    reordered[keep] = False
    slow = (shown[2:] - shown[:-2]) * float(index.time_base) > MAX_SECONDS
    reordered[1:-1] &= ~slow
    return np.setdiff1d(shown[reordered], np.fromiter(sampled, np.int64), assume_unique=True)


def _spread(anchors: np.ndarray, gap: int) -> Iterator[int]:
    """Places between anchors, evenly, so that no two neighbours are more than `gap` apart."""
    for low, high in itertools.pairwise(anchors.tolist()):
        pieces = -(-(high - low) // gap)
        yield from (low + (high - low) * i // pieces for i in range(1, pieces))


class Numbering:
    """Numbers decoded frames in display order, counting the frames that were left out before them."""

    def __init__(self, skipped: np.ndarray) -> None:
        self.pts: list[int] = []
        self._skipped = skipped.tolist()
        self._place = 0

    def add(self, pts: int) -> int:
        """The number of the decoded frame with this timestamp."""
        while self._place < len(self._skipped) and self._skipped[self._place] <= pts:
            if self._skipped[self._place] < pts:
                self.pts.append(self._skipped[self._place])
            self._place += 1
        self.pts.append(pts)
        return len(self.pts) - 1


class Debt:
    """Counts the frames that second looks will decode once more, as steps that need one come up."""

    def __init__(self, keyframes: np.ndarray) -> None:
        self._keyframes = keyframes
        self._again = 0
        self._until = 0

    def grows_too_large(self, after: int) -> bool:
        """Note that frames just before `after` are needed; whether leaving frames out no longer pays."""
        place = int(np.searchsorted(self._keyframes, after - 1, side="right")) - 1
        start = max(int(self._keyframes[place]) if place >= 0 else 0, self._until)
        self._again += max(after - start, 0)
        self._until = max(self._until, after)
        return self._again > AGAIN_FREE + AGAIN_SHARE * after
