"""Choosing the frames that the decode pass skips: those that no other frame refers to, as long as enough remain.

About half of the frames of a usual H.264 stream are B-frames that nothing depends on; decoding without them costs two
thirds. The order of the timestamps alone tells before decoding which packets hold them. Frames that are sampled for
motion, text and similarity are never skipped, so samples equal those of a full decode. Where a cut may hide between two
decoded frames, the frames between are decoded after all (cuts.finder.CutFinder).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from svd.curation.decoding.probe import PacketIndex

# Codecs whose decoders skip single frames without side effects; sources of other codecs are decoded in full.
SKIPPING_CODECS = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4")
MAX_SECONDS = 0.17  # between two decoded frames
# Frames decoded twice may be this share of all frames so far, beyond the first AGAIN_FREE; above it skipping ends.
AGAIN_SHARE = 0.25
AGAIN_FREE = 60


def skippable(index: PacketIndex, gap: int, sampled: Iterable[int]) -> np.ndarray:
    """Return the timestamps of the frames that the decoder may skip, ascending.

    Only reordered frames after the first keyframe are skipped, and none of `sampled` (timestamps). Decoded frames stay
    at most `gap` frames and MAX_SECONDS apart. The decoder still decodes those that others refer to.
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
    """Yield evenly spaced places between anchors, so that no two neighbours are more than `gap` apart."""
    for low, high in itertools.pairwise(anchors.tolist()):
        pieces = -(-(high - low) // gap)
        yield from (low + (high - low) * i // pieces for i in range(1, pieces))


class Numbering:
    """Numbers decoded frames in display order; skipped frames are counted too."""

    def __init__(self, skipped: np.ndarray) -> None:
        self.pts: list[int] = []
        self._skipped = skipped.tolist()
        self._place = 0

    def add(self, pts: int) -> int:
        """Return the number of the next decoded frame, which has this timestamp."""
        while self._place < len(self._skipped) and self._skipped[self._place] <= pts:
            if self._skipped[self._place] < pts:
                self.pts.append(self._skipped[self._place])
            self._place += 1
        self.pts.append(pts)
        return len(self.pts) - 1


class DecodedTwice:
    """Counts the frames that will have to be decoded a second time, to find when skipping no longer pays."""

    def __init__(self, keyframes: np.ndarray) -> None:
        self._keyframes = keyframes
        self._again = 0
        self._until = 0

    def grows_too_large(self, after: int) -> bool:
        """Note that skipped frames just before `after` are needed; say whether skipping no longer pays."""
        place = int(np.searchsorted(self._keyframes, after - 1, side="right")) - 1
        start = max(int(self._keyframes[place]) if place >= 0 else 0, self._until)
        self._again += max(after - start, 0)
        self._until = max(self._until, after)
        return self._again > AGAIN_FREE + AGAIN_SHARE * after
