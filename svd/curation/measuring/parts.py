"""Splitting long sources by time into parts, so that several processes work on one film.

A part begins at a keyframe. Its packets are copied into a file of their own, as for a clip, and the results are mapped
back to the clock of the source. The copy includes a few seconds on both sides of the part, so that cuts near a boundary
are found as in the whole source. A cut belongs to the part that holds its start; a cut exactly on a boundary belongs to
the part that ends there. No clip crosses a boundary, just as no clip crosses the point where a long shot is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np

from svd.config import CurationConfig
from svd.curation.base.types import ClipSpan, Cut, DroppedSpan, Seconds, SourceAnalysis, SourceFacts, SourceFailure
from svd.curation.clips.spans import Timeline
from svd.curation.clips.writer import copy_frames
from svd.curation.cuts.finder import SETTLE_SECONDS
from svd.curation.decoding.probe import PacketIndex, SourceInfo, open_video, read_packets, read_source
from svd.curation.measuring.decode_pass import COPY_CODECS, Taken, Window, analyse

MOST_REORDERED = 16  # frames by which decoding order may differ from display order, H.264's limit
LEAST_RATE = 4000  # bytes per second; a file smaller than one part at this rate is not probed for splitting
Part = tuple[int, int]  # number of the part, number of parts
WHOLE: Part = (0, 1)


def part_starts(timeline: Timeline, seconds: float) -> list[int]:
    """Return the keyframes (frame numbers) at which parts of about `seconds` begin; [0]: one part."""
    keys, pts = timeline.keyframes, timeline.pts
    total = timeline.seconds(len(pts)) - timeline.seconds(0)
    count = max(1, round(total / seconds))
    if not len(keys) or keys[0] != 0:
        return [0]
    times = (pts[keys] - pts[0]) * timeline.time_base
    wanted = total * np.arange(1, count) / count
    return sorted({0, *(int(keys[np.abs(times - time).argmin()]) for time in wanted)})


def _timeline(index: PacketIndex) -> Timeline:
    shown = index.shown()
    return Timeline(shown, int(shown[-1]) + max(1, index.last_duration), index, index.time_base)


def seconds_claimed(path: Path) -> float:
    """Return the duration from the header, limited by the size of the file: broken headers promise years.

    Raises SourceFailure when it is no readable video.
    """
    with open_video(path) as (container, _):
        return min((container.duration or 0) / av.time_base, path.stat().st_size / LEAST_RATE)


def count_parts(path: Path, config: CurationConfig) -> int:
    """Return into how many parts a source is split; raises SourceFailure when it is no readable video."""
    if path.stat().st_size < config.part_seconds * LEAST_RATE:
        return 1
    info, index = read_source(path), read_packets(path)
    # AVI stores the timestamps of decoding, not of display.
    if info.container == "avi" or info.codec not in COPY_CODECS or not index.trusted or index.discarded.any():
        return 1
    return len(part_starts(_timeline(index), config.part_seconds))


def analyse_part(
    path: Path,
    config: CurationConfig,
    taken: Taken,
    part: Part,
    scratch: Path | None,
    spans: Sequence[Seconds] = (),
) -> SourceAnalysis:
    """Analyse one part of a source as `decode_pass.analyse` does; its packets are copied to `scratch`, then removed.

    scratch: may be None for WHOLE, which is analysed in place. Frame numbers, times and `facts.start_pts` are those of
    the source; `facts.frames` and `facts.duration` are those of the part. The cut at which the first clip of this part
    begins is counted as `inherited` when the part before lists it. Raises SourceFailure.
    """
    if part == WHOLE:
        return analyse(path, config, taken, spans=spans)
    assert scratch is not None
    info, index = read_source(path), read_packets(path)
    clock = _Clock(index, config.part_seconds, part[0])
    try:
        copy_frames(path, clock.copied_span(), scratch)
        clock.local = read_packets(scratch).time_base
        analysis = analyse(
            scratch,
            config,
            lambda clip: taken(replace(clip, span=clock.span(clip.span))),
            clock.window(),
            clock.listed(spans),
        )
    finally:
        scratch.unlink(missing_ok=True)
    if analysis.facts.time_base != clock.local:
        raise SourceFailure("its frames are not in the order of their timestamps, and it is too long for one part")
    return replace(
        analysis,
        facts=clock.facts(analysis.facts, info, index.warnings),
        cuts=[clock.cut(cut) for cut in analysis.cuts],
        dropped=[clock.dropped(span) for span in analysis.dropped],
    )


class _Clock:
    """Converts frame numbers and times of a part into those of its source."""

    def __init__(self, index: PacketIndex, seconds: float, number: int) -> None:
        self.source, self.base = _timeline(index), index.time_base
        self.local = index.time_base  # time base of the part's own file
        bounds = [*part_starts(self.source, seconds), len(self.source.pts)]
        self.first, self.next = bounds[number], bounds[number + 1]
        self.lead = self._keyframe_before()
        self.last = self.source.copy_end(self.lead, self._end_behind())
        if self.last < self.next:
            raise SourceFailure("packets are missing between two of its parts, and it is too long for one")
        self.start = self.source.at(self.lead)

    def _keyframe_before(self) -> int:
        """Return a keyframe some seconds before the part, or the first one."""
        keys = self.source.keyframes
        early = self.source.pts[keys] <= self.source.at(self.first) - SETTLE_SECONDS / self.source.time_base
        return int(keys[max(int(early.sum()) - 1, 0)])

    def _end_behind(self) -> int:
        """Return a frame some seconds after the part, or the end of the source."""
        limit = self.source.at(self.next) + SETTLE_SECONDS / self.source.time_base
        enough = max(int(np.searchsorted(self.source.pts, limit)), self.next + MOST_REORDERED + 1)
        return min(enough, len(self.source.pts))

    def copied_span(self) -> ClipSpan:
        """Return the span that is copied: the part and what surrounds it."""
        at, seconds, frames = self.source.at, self.source.seconds, self.last - self.lead
        ends = at(self.lead), at(self.last), seconds(self.lead), seconds(self.last)
        return ClipSpan(self.lead, self.last, *ends, frames, "copy", self.lead, self.last)

    def window(self) -> Window:
        """Return the frames of the copy that belong to the part."""
        return self.first - self.lead, self.next - self.lead

    def listed(self, spans: Sequence[Seconds]) -> list[Seconds]:
        """Convert spans, which count from the first frame of the source, to the copy; they may begin below 0."""
        before = self.source.seconds(self.lead) - self.source.seconds(0)
        return [(start - before, end - before) for start, end in spans]

    def pts(self, local: int) -> int:
        """Convert a timestamp of the copy, which begins with 0, to one of the source."""
        return self.start + int(local * self.local / self.base)

    def at(self, frame: int) -> int:
        """Convert a frame number of the copy to one of the source."""
        return self.lead + frame

    def seconds(self, pts: int) -> float:
        """Convert a timestamp of the source to seconds."""
        return pts * self.source.time_base

    def span(self, span: ClipSpan) -> ClipSpan:
        """Convert the span of a clip; `start_cut` and `end_cut` stay indices into the cuts of the part."""
        start, end = self.pts(span.start_pts), self.pts(span.end_pts)
        return replace(
            span,
            start_frame=self.at(span.start_frame),
            end_frame=self.at(span.end_frame),
            start_pts=start,
            end_pts=end,
            start_seconds=self.seconds(start),
            end_seconds=self.seconds(end),
            shot_start_frame=self.at(span.shot_start_frame),
            shot_end_frame=self.at(span.shot_end_frame),
        )

    def cut(self, cut: Cut) -> Cut:
        """Convert a cut and its transition."""
        zero = self.seconds(self.start)
        return replace(
            cut,
            frame=self.at(cut.frame),
            start_frame=self.at(cut.start_frame),
            end_frame=self.at(cut.end_frame),
            pts=self.pts(cut.pts),
            seconds=self.seconds(self.pts(cut.pts)),
            start_seconds=zero + cut.start_seconds,
            end_seconds=zero + cut.end_seconds,
        )

    def dropped(self, span: DroppedSpan) -> DroppedSpan:
        """Convert a span that no clip holds."""
        start, end = self.pts(span.start_pts), self.pts(span.end_pts)
        return DroppedSpan(
            self.at(span.start_frame),
            self.at(span.end_frame),
            start,
            end,
            self.seconds(start),
            self.seconds(end),
            span.reason,
        )

    def facts(self, facts: SourceFacts, info: SourceInfo, warnings: tuple[str, ...]) -> SourceFacts:
        """Convert the facts of the part to the times of the source; info: of the source."""
        there = (self.source.end_pts - self.source.at(0)) * self.source.time_base
        duration, frames = self.source.seconds(self.next) - self.source.seconds(self.first), self.next - self.first
        return replace(
            facts,
            frames=frames,
            duration=duration,
            fps=frames / duration,
            container=info.container,
            decoded_share=min(there / info.declared, 1.0) * (facts.decoded_share or 1.0) if info.declared > 0 else None,
            time_base=self.base,
            start_pts=self.source.at(0),
            end_pts=self.source.at(self.next),
            keyframes=tuple(self.pts(key) for key in facts.keyframes),
            warnings=(*warnings, *facts.warnings),
        )
