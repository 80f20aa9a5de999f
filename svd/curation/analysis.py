"""The one decode pass of a source (§3.1, App. C): cuts at several frame rates, motion, camera motion and sampled
frames.

Everything that needs pixels shares this pass. Memory is bounded by CHUNK_SECONDS and the longest clip, not by the
source.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from svd.config import CurationConfig
from svd.curation.clips import Shot, SpanPlanner, Timeline
from svd.curation.cuts import CutFinder, Found
from svd.curation.decode import Decoder
from svd.curation.probe import PacketIndex, SourceInfo, read_packets, read_source
from svd.curation.sampling import Geometry, Sampler
from svd.curation.types import Analysis, ClipAnalysis, Cut, DroppedSpan, SourceFacts, SourceFailure

CHUNK_SECONDS = 20.0
COPY_CODECS = ("h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video", "av1", "vp9")
Taken = Callable[[ClipAnalysis], ClipAnalysis]


def analyse(path: Path, config: CurationConfig, taken: Taken = lambda clip: clip) -> Analysis:
    """Decode `path` once and find its cuts, clips, motion and sampled frames.

    taken: called with each clip once it is complete; the analysis holds what it returns. Frames that it puts elsewhere
    take no memory, however long the source is. A source that has to be begun again begins again with its first clip.
    Raises SourceFailure, with a readable reason, for anything that can't be decoded as video. It trusts the decoder
    with the file: for untrusted files use worker.analyse_guarded.
    """
    started = time.process_time()
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # one source, one thread: sources run side by side
    try:
        return _analyse(path, config, started, taken)
    finally:
        cv2.setNumThreads(threads)


def _analyse(path: Path, config: CurationConfig, started: float, taken: Taken) -> Analysis:
    info, index = read_source(path), read_packets(path)
    demuxed = time.process_time()
    run = _Pass(path, config, info, index, taken)
    try:
        run.decode()
    except _DisorderError:
        run = _Pass(path, config, info, index.without_timestamps(), taken)
        run.decode()
    analysis = run.finish()
    timing = {"demux": demuxed - started, "decode_and_analyse": time.process_time() - demuxed}
    return Analysis(analysis.facts, analysis.cuts, analysis.clips, analysis.dropped, timing)


class _DisorderError(Exception):
    """Frames leave the decoder in another order than their timestamps say, as with B-frames in AVI."""


class _Pass:
    """The state of one decode pass."""

    def __init__(self, path: Path, config: CurationConfig, info: SourceInfo, index: PacketIndex, taken: Taken) -> None:
        self.config, self.info, self.index, self.taken = config, info, index, taken
        self.decoder = Decoder(path)
        self.rate = info.fps(index)
        # Without usable timestamps frames are counted: the clock ticks once a frame.
        self.base = index.time_base if index.trusted else 1 / self.rate
        self.pts: list[int] = []
        self.finder = CutFinder(config.cuts, float(self.rate))
        self.sampler: Sampler | None = None
        self.motion: list[np.ndarray] = []  # (n, 4) between neighbouring frames, from frame 0 on
        self.cuts: list[Cut] = []
        self.clips: list[ClipAnalysis] = []
        self.dropped: list[DroppedSpan] = []
        self._shot_start = 0
        self._shot_cut: int | None = None

    def decode(self) -> None:
        """Decode the source; shots are closed as soon as their cuts are certain."""
        checked = 0.0
        for picture in self.decoder:
            pts = len(self.pts) if not self.index.trusted else picture.pts
            if pts is None or (self.pts and pts <= self.pts[-1]):
                raise _DisorderError
            number, seconds = len(self.pts), pts * self.base.numerator / self.base.denominator
            self.pts.append(pts)
            if self.sampler is None:
                geometry = Geometry(self.decoder.facts.rotation, self.info.display(self.decoder.facts.rotation))
                self.sampler = Sampler(self.config.motion, geometry, self.decoder.facts)
                checked = seconds
            self.finder.add(seconds, picture)
            self.sampler.add(number, seconds, picture)
            if seconds - checked >= CHUNK_SECONDS:
                checked = seconds
                self._settle()

    def _timeline(self) -> Timeline:
        pts = np.array(self.pts, np.int64)
        return Timeline(pts, self._end(pts), self.index, self.base)

    def _end(self, pts: np.ndarray) -> int:
        step = int(np.median(np.diff(pts))) if len(pts) > 1 else 1
        last = self.index.last_duration if self.index.trusted else 1
        return int(pts[-1]) + (last if 0 < last <= 4 * step else max(step, 1))

    def _settle(self, final: bool = False) -> None:
        timeline = self._timeline()
        self.motion.append(self.finder.motion(sum(map(len, self.motion))))
        for found in self.finder.settle(final):
            self._close(found, timeline)
        assert self.sampler is not None
        self.sampler.thin(self.finder.settled)

    def _close(self, found: Found, timeline: Timeline) -> None:
        """A cut is certain: the shot before it is complete."""
        if found.end <= self._shot_start and self.cuts:
            return
        number = len(self.cuts)
        start = max(found.start, self._shot_start)
        self.cuts.append(self._cut(found, start, timeline))
        self._shot(Shot(self._shot_start, start, self._shot_cut, number), timeline)
        if found.end > start:
            self.dropped.append(self._transition(start, found.end, found.kind, timeline))
        self._shot_start, self._shot_cut = found.end, number
        assert self.sampler is not None
        self.sampler.forget(found.end)

    def _cut(self, found: Found, start: int, t: Timeline) -> Cut:
        return Cut(
            kind=found.kind,
            frame=found.end,
            start_frame=start,
            end_frame=found.end,
            pts=t.at(found.end),
            seconds=t.seconds(found.end),
            start_seconds=t.seconds(start),
            end_seconds=t.seconds(found.end),
            detector=found.detector,
            score=round(found.score, 4),
            threshold=found.threshold,
        )

    def _transition(self, start: int, end: int, kind: str, t: Timeline) -> DroppedSpan:
        return DroppedSpan(start, end, t.at(start), t.at(end), t.seconds(start), t.seconds(end), f"transition: {kind}")

    def _shot(self, shot: Shot, timeline: Timeline) -> None:
        if shot.end <= shot.start:
            return
        assert self.sampler is not None
        motion = np.concatenate(self.motion) * float(self.rate)
        copyable = self.info.codec in COPY_CODECS
        spans, dropped = SpanPlanner(timeline, self.config.clips, copyable).plan(shot)
        self.dropped += dropped
        for span in spans:
            samples = self.sampler.take(span, motion[span.start_frame : span.end_frame - 1], float(self.rate))
            if samples is None:
                self.dropped.append(
                    DroppedSpan(
                        span.start_frame,
                        span.end_frame,
                        span.start_pts,
                        span.end_pts,
                        span.start_seconds,
                        span.end_seconds,
                        "no frame could be sampled",
                    )
                )
                continue
            self.clips.append(self.taken(ClipAnalysis(span=span, **vars(samples))))

    def finish(self) -> Analysis:
        """Close the last shot and put everything together."""
        if len(self.pts) < 2 or self.sampler is None:
            raise SourceFailure("a single frame is no video")
        self._settle(final=True)
        timeline = self._timeline()
        self._shot(Shot(self._shot_start, len(self.pts), self._shot_cut, None), timeline)
        self.dropped.sort(key=lambda d: d.start_frame)
        return Analysis(self._facts(timeline), self.cuts, self.clips, self.dropped)

    def _facts(self, timeline: Timeline) -> SourceFacts:
        facts, info = self.decoder.facts, self.info
        steps = np.diff(timeline.pts)
        duration = (timeline.end_pts - int(timeline.pts[0])) * float(self.base)
        if duration <= 0:
            raise SourceFailure("its timestamps don't advance")
        warnings = list(self.index.warnings)
        if facts.errors:
            warnings.append(f"{facts.errors} packets can't be decoded")
        width, height = info.display(facts.rotation)
        return SourceFacts(
            container=info.container,
            codec=info.codec,
            pixel_format=facts.pixel_format,
            width=info.width,
            height=info.height,
            display_width=width,
            display_height=height,
            rotation=facts.rotation,
            sample_aspect=(info.sample_aspect.numerator, info.sample_aspect.denominator),
            interlaced=facts.interlaced,
            fps=len(timeline.pts) / duration,
            variable_frame_rate=bool(
                steps.max() > 1.5 * max(float(np.median(steps)), 1e-9) or steps.min() < 0.5 * np.median(steps)
            ),
            time_base=Fraction(self.base),
            start_pts=int(timeline.pts[0]),
            end_pts=timeline.end_pts,
            duration=duration,
            frames=len(timeline.pts),
            bit_rate=round(8 * float(self.index.size.sum()) / duration),
            b_frames=bool((np.diff(self.index.pts) < 0).any()) if self.index.trusted else False,
            keyframes=tuple(int(timeline.pts[k]) for k in timeline.keyframes),
            warnings=tuple(warnings),
        )
