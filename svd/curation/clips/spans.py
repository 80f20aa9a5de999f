"""From cuts to clips (App. C): which frames each clip holds, so that its packets can be copied without re-encoding.

A clip starts at the first keyframe after a cut. It ends before the next cut, at the last place where the packets, in
decoding order, decode to complete and consecutive frames. Frames that can't be copied are re-encoded or dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from svd.config import ClipsConfig
from svd.curation.base.types import ClipSpan, Cut, DroppedSpan
from svd.curation.decoding.probe import PacketIndex


@dataclass(frozen=True)
class ShotSpan:
    """The frames [start, end) between two cuts, given by their indices; None at the ends of the source.

    listed: as in ClipSpan.
    """

    start: int
    end: int
    start_cut: int | None
    end_cut: int | None
    listed: int | None = None


class Timeline:
    """Frame numbers, timestamps and packets of a source, and conversions between them.

    pts: (N,), timestamp of each decoded frame in display order. end_pts: where the last frame ends.
    """

    def __init__(self, pts: np.ndarray, end_pts: int, index: PacketIndex, time_base: Fraction) -> None:
        self.pts, self.end_pts, self.time_base = pts, end_pts, float(time_base)
        self._numbers = np.full(len(index.pts), -1, np.int64)
        if index.trusted:
            place = np.searchsorted(pts, index.pts)
            inside = np.minimum(place, len(pts) - 1)
            exact = (pts[inside] == index.pts) & ~index.discarded
            self._numbers[exact] = inside[exact]
        self._keys = np.flatnonzero(index.keyframe & (self._numbers >= 0))
        self.keyframes = np.sort(self._numbers[self._keys])
        self._packet_of = {int(self._numbers[k]): int(k) for k in self._keys}

    def at(self, frame: int) -> int:
        """Return the timestamp of a frame; of the end for the frame after the last one."""
        return int(self.pts[frame]) if frame < len(self.pts) else self.end_pts

    def seconds(self, frame: int) -> float:
        """Return the time of a frame on the source's clock."""
        return self.at(frame) * self.time_base

    def copy_end(self, start: int, end: int) -> int:
        """Return the greatest end ≤ `end` such that the packets from keyframe `start` decode to exactly [start, end).

        Returns `start` when there is none.
        """
        best = start
        seen: set[int] = set()
        highest = start - 1
        for number in self._numbers[self._packet_of[start] :]:
            number = int(number)
            if number >= end:
                break
            if number < start:
                if seen and number >= 0:
                    continue  # a leading frame of an open group of pictures: it belongs to the shot before
                if number < 0:
                    break  # a packet that decoded to nothing: what follows may refer to it
            seen.add(number)
            highest = max(highest, number)
            if len(seen) == highest + 1 - start:
                best = highest + 1
        return best


def shots(cuts: list[Cut], frames: int) -> Iterator[ShotSpan]:
    """Yield the shots between cuts; transitions belong to no shot."""
    start, start_cut = 0, None
    for i, cut in enumerate(cuts):
        if cut.start_frame > start:
            yield ShotSpan(start, cut.start_frame, start_cut, i)
        start, start_cut = max(start, cut.end_frame), i
    if frames > start:
        yield ShotSpan(start, frames, start_cut, None)


class SpanPlanner:
    """Splits shots into clips; every frame ends up in a clip or in a DroppedSpan.

    Clips are copied from keyframes on. With `no_keyframe: reencode`, what lies between them becomes re-encoded clips
    wherever it is long enough. A shorter rest is dropped: joining it to a copied clip would re-encode that one too.
    """

    def __init__(self, timeline: Timeline, config: ClipsConfig, copyable: bool = True) -> None:
        self.timeline, self.config, self.copyable = timeline, config, copyable
        self._reencodes = config.no_keyframe == "reencode"

    def plan(self, shot: ShotSpan) -> tuple[list[ClipSpan], list[DroppedSpan]]:
        """Return the clips of one shot and what is left of it."""
        spans = list(self._copies(shot)) if self.copyable else []
        if self._reencodes:
            exact = [span for start, end in _gaps(shot, spans) for span in self._exact(start, end, shot)]
            spans = sorted([*spans, *exact], key=lambda span: span.start_frame)
        dropped = [self.drop(start, end, self._reason(start, end, shot)) for start, end in _gaps(shot, spans)]
        return list(_without_inner_cuts(spans)), dropped

    def _duration(self, start: int, end: int) -> float:
        """Return the seconds of the frames [start, end)."""
        return (self.timeline.at(end) - self.timeline.at(start)) * self.timeline.time_base

    def _long_enough(self, start: int, end: int) -> bool:
        """Say whether the frames [start, end) are enough for a clip."""
        return end - start >= 2 and self._duration(start, end) >= self.config.min_seconds - 1e-6

    def drop(self, start: int, end: int, reason: str) -> DroppedSpan:
        """Return the frames [start, end) as a span that no clip holds."""
        t = self.timeline
        return DroppedSpan(start, end, t.at(start), t.at(end), t.seconds(start), t.seconds(end), reason)

    def _reason(self, start: int, end: int, shot: ShotSpan) -> str:
        """Say why no clip holds the frames [start, end)."""
        keys = self.timeline.keyframes
        if self._duration(start, end) < self.config.min_seconds:
            return f"shorter than {self.config.min_seconds:g} s"
        if self._reencodes or end - start < 2:
            return f"no two frames within {self.config.max_seconds:g} s"
        if not self.copyable or not ((keys >= shot.start) & (keys < shot.end)).any():
            return "no usable keyframe"
        if end < shot.end:
            return "before the next keyframe"
        return "after the last complete packet" if ((keys > start) & (keys < end)).any() else "no later keyframe"

    def _span(self, start: int, end: int, shot: ShotSpan, copy: bool) -> ClipSpan:
        t = self.timeline
        steps = np.diff(t.pts[start:end])
        return ClipSpan(
            start_frame=start,
            end_frame=end,
            start_pts=t.at(start),
            end_pts=t.at(end),
            start_seconds=t.seconds(start),
            end_seconds=t.seconds(end),
            frames=end - start,
            method="copy" if copy else "reencode",
            shot_start_frame=shot.start,
            shot_end_frame=shot.end,
            start_cut=shot.start_cut,
            end_cut=shot.end_cut,
            listed=shot.listed,
            fps=len(steps) / (float(steps.sum()) * t.time_base),
            variable_rate=varies(steps),
        )

    def _copies(self, shot: ShotSpan) -> Iterator[ClipSpan]:
        """Yield clips from a keyframe to a packet boundary, none longer than max_seconds."""
        keys = self.timeline.keyframes
        keys = keys[(keys >= shot.start) & (keys < shot.end)]
        position = shot.start
        while len(later := keys[keys >= position]):
            start = int(later[0])
            target = self._copy_target(start, shot.end, later)
            if self.config.end == "keyframe" and target < len(self.timeline.pts):
                target = int(self._keys_until(target)[-1])
            end = self.timeline.copy_end(start, target)
            if self._long_enough(start, end):
                yield self._span(start, end, shot, copy=True)
            position = max(end, start + 1)

    def _keys_until(self, frame: int) -> np.ndarray:
        return self.timeline.keyframes[self.timeline.keyframes <= frame]

    def _split(self, start: int, end: int) -> int:
        """Return where a clip from `start` ends that may hold any of the frames up to `end`, but max_seconds at most.

        A rest shorter than min_seconds would be lost: such frames are shared evenly, if both halves are long enough.
        """
        longest = self._within(start, self.timeline.at(start) + self.config.max_seconds / self.timeline.time_base)
        if self._duration(start, end) <= self.config.max_seconds:
            return end
        if not self._long_enough(longest, end):
            middle = self._within(start, (self.timeline.at(start) + self.timeline.at(end)) / 2)
            if self._long_enough(start, middle) and self._long_enough(middle, end):
                return middle
        return longest

    def _within(self, start: int, limit: float) -> int:
        """Return the last frame that begins at the timestamp `limit` or before it, but one after `start`."""
        return max(int(np.searchsorted(self.timeline.pts, limit, side="right")) - 1, start + 1)

    def _copy_target(self, start: int, end: int, keys: np.ndarray) -> int:
        """Return where a copied clip from keyframe `start` should end: if it must be split, at a keyframe.

        Without one it ends after max_seconds, or so much earlier that the frames before the next keyframe make a clip.
        """
        t, seconds = self.timeline, self._duration(start, end)
        if seconds <= self.config.max_seconds:
            return end
        longest = self._within(start, t.at(start) + self.config.max_seconds / t.time_base)
        near = keys[(keys > start) & (keys <= longest)].tolist()
        usable = [key for key in near if self._long_enough(start, key) and self._long_enough(key, end)]
        if usable:
            return max([key for key in usable if key <= self._split(start, end)] or usable)
        if not self._reencodes:
            return longest
        stop = min([*keys[keys > longest].tolist(), end])
        room = self._within(start, t.at(stop) - self.config.min_seconds / t.time_base)
        return min(longest, room) if self._long_enough(start, room) else longest

    def _exact(self, start: int, stop: int, shot: ShotSpan) -> Iterator[ClipSpan]:
        """Yield re-encoded clips of the frames [start, stop), none longer than max_seconds."""
        while start < stop:
            end = self._split(start, stop)
            if self._long_enough(start, end):
                yield self._span(start, end, shot, copy=False)
            start = end


def varies(steps: np.ndarray) -> bool:
    """Say whether frames that are shown for `steps` have a variable rate, beyond what rounding to a time base does."""
    usual = max(float(np.median(steps)), 1e-9)
    return bool(steps.max() > 1.5 * usual or steps.min() < 0.5 * usual)


def _gaps(shot: ShotSpan, spans: Sequence[ClipSpan]) -> Iterator[tuple[int, int]]:
    """Yield the frames [start, end) of a shot that none of the ascending `spans` holds."""
    ends = [shot.start, *(span.end_frame for span in spans)]
    starts = [*(span.start_frame for span in spans), shot.end]
    yield from ((start, end) for start, end in zip(ends, starts, strict=True) if start < end)


def _without_inner_cuts(spans: list[ClipSpan]) -> Iterator[ClipSpan]:
    """Remove the cuts from the ends at which a shot was only split."""
    for i, span in enumerate(spans):
        yield replace(
            span,
            start_cut=span.start_cut if i == 0 else None,
            end_cut=span.end_cut if i == len(spans) - 1 else None,
        )
