"""From cuts to clips (App. C): which frames each clip holds, so that its packets can be copied without re-encoding.

A clip starts at the first keyframe after a cut. It ends before the next cut, at the last place where the packets, in
decoding order, decode to complete and consecutive frames. A shot without a usable keyframe is re-encoded or dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """Splits shots into clips; every frame ends up in a clip or in a DroppedSpan."""

    def __init__(self, timeline: Timeline, config: ClipsConfig, copyable: bool = True) -> None:
        self.timeline, self.config, self.copyable = timeline, config, copyable

    def plan(self, shot: ShotSpan) -> tuple[list[ClipSpan], list[DroppedSpan]]:
        """Return the clips of one shot and what is left of it."""
        seconds = self._duration(shot.start, shot.end)
        if seconds < self.config.min_seconds - 1e-6 or shot.end - shot.start < 2:
            return [], [self.drop(shot.start, shot.end, f"shorter than {self.config.min_seconds:g} s")]
        spans = list(self._copies(shot)) if self.copyable else []
        if not spans:
            if self.config.no_keyframe == "drop":
                return [], [self.drop(shot.start, shot.end, "no usable keyframe")]
            spans = list(self._exact(shot))
        return spans, list(self._rest(shot, spans))

    def _duration(self, start: int, end: int) -> float:
        """Return the seconds of the frames [start, end)."""
        return (self.timeline.at(end) - self.timeline.at(start)) * self.timeline.time_base

    def drop(self, start: int, end: int, reason: str) -> DroppedSpan:
        """Return the frames [start, end) as a span that no clip holds."""
        t = self.timeline
        return DroppedSpan(start, end, t.at(start), t.at(end), t.seconds(start), t.seconds(end), reason)

    def _span(self, start: int, end: int, shot: ShotSpan, copy: bool) -> ClipSpan:
        t = self.timeline
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
            start_cut=shot.start_cut if start < shot.start + 1 or copy else None,
            end_cut=shot.end_cut,
            listed=shot.listed,
        )

    def _copies(self, shot: ShotSpan) -> Iterator[ClipSpan]:
        """Yield clips from a keyframe to a packet boundary, none longer than max_seconds."""
        keys = self.timeline.keyframes
        keys = keys[(keys >= shot.start) & (keys < shot.end)]
        spans: list[ClipSpan] = []
        position = shot.start
        while True:
            later = keys[keys >= position]
            if not len(later):
                break
            start = int(later[0])
            target = self._target(start, shot.end, later)
            if self.config.end == "keyframe" and target < len(self.timeline.pts):
                target = int(self._keys_until(target)[-1])
            end = self.timeline.copy_end(start, target)
            if self._duration(start, end) >= self.config.min_seconds - 1e-6 and end - start >= 2:
                spans.append(self._span(start, end, shot, copy=True))
            position = max(end, start + 1)
        yield from _without_inner_cuts(spans)

    def _keys_until(self, frame: int) -> np.ndarray:
        return self.timeline.keyframes[self.timeline.keyframes <= frame]

    def _target(self, start: int, end: int, keys: np.ndarray | None) -> int:
        """Return where a clip from `start` should end: at `end`, or in a long shot after at most max_seconds.

        A long shot is split at a keyframe if possible. keys: the keyframes; None when frames are re-encoded.
        """
        if self._duration(start, end) <= self.config.max_seconds:
            return end
        limit = self.timeline.at(start) + self.config.max_seconds / self.timeline.time_base
        if self._duration(start, end) < self.config.max_seconds + self.config.min_seconds:
            limit = self.timeline.at(start) + (self.timeline.at(end) - self.timeline.at(start)) / 2
        last = int(np.searchsorted(self.timeline.pts, limit, side="right")) - 1
        if keys is not None:
            usable = keys[(keys > start) & (keys <= last)]
            if len(usable) and self._duration(start, int(usable[-1])) >= self.config.min_seconds:
                return int(usable[-1])
        return max(last, start + 1)

    def _exact(self, shot: ShotSpan) -> Iterator[ClipSpan]:
        """Yield clips that are re-encoded, with ends at any frame."""
        spans: list[ClipSpan] = []
        start = shot.start
        while start < shot.end:
            end = self._target(start, shot.end, None)
            if self._duration(start, end) >= self.config.min_seconds - 1e-6:
                spans.append(self._span(start, end, shot, copy=False))
            start = end
        yield from _without_inner_cuts(spans)

    def _rest(self, shot: ShotSpan, spans: list[ClipSpan]) -> Iterator[DroppedSpan]:
        """Yield the frames of a shot that no clip holds."""
        position = shot.start
        for span in spans:
            if span.start_frame > position:
                yield self.drop(position, span.start_frame, "before the next keyframe")
            position = span.end_frame
        if position < shot.end:
            yield self.drop(position, shot.end, "after the last complete packet")


def _without_inner_cuts(spans: list[ClipSpan]) -> Iterator[ClipSpan]:
    """Remove the cuts from the ends at which a shot was only split."""
    for i, span in enumerate(spans):
        yield replace(
            span,
            start_cut=span.start_cut if i == 0 else None,
            end_cut=span.end_cut if i == len(spans) - 1 else None,
        )
