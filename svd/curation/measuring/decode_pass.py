"""The one decode pass of a source (§3.1, App. C): cuts at several frame rates, flow, camera motion, sampled frames.

Everything that needs pixels shares this pass. Memory is bounded by CHUNK_SECONDS and the longest clip, not by the
length of the source.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av.error
import cv2
import numpy as np

from svd.config import CurationConfig
from svd.curation.base.types import (
    ClipAnalysis,
    ClipSpan,
    Cut,
    DroppedSpan,
    Seconds,
    SourceAnalysis,
    SourceFacts,
    SourceFailure,
)
from svd.curation.clips.listed import pieces
from svd.curation.clips.samples import DisplayGeometry, Sampler, sampled_times
from svd.curation.clips.spans import ShotSpan, SpanPlanner, Timeline, varies
from svd.curation.cuts.decisions import Found
from svd.curation.cuts.finder import CutFinder, Step, scored_stride
from svd.curation.cuts.frame_scores import Look
from svd.curation.decoding.decoder import DecodedFrame, FrameDecoder
from svd.curation.decoding.probe import PacketIndex, SourceInfo, read_packets, read_source
from svd.curation.decoding.skipping import SKIPPING_CODECS, DecodedTwice, Numbering, skippable

CHUNK_SECONDS = 20.0  # cuts are decided, and clips completed, this often
# Codecs whose packets an MP4 file can hold; clips of other codecs are re-encoded.
COPY_CODECS = ("h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video", "av1", "vp9")
Taken = Callable[[ClipAnalysis], ClipAnalysis]
Window = tuple[int, int]  # frame numbers [first, end)


def analyse(
    path: Path,
    config: CurationConfig,
    taken: Taken = lambda clip: clip,
    window: Window | None = None,
    spans: Sequence[Seconds] = (),
) -> SourceAnalysis:
    """Decode `path` once and find its cuts, clips, motion and sampled frames.

    taken: called with each clip when it is complete; the analysis holds what it returns. A callback that stores the
    frames elsewhere and returns the clip without them keeps memory small for long sources. When the pass must start
    over, it is called again from the first clip on.
    window: the frames that count. Frames around it are decoded too, so that a cut at either end is found as in the
    middle of a source. A cut belongs to the window that holds its start, or that ends exactly there.
    spans: the clips that a list names, in seconds from the first frame. No clip crosses their ends or lies outside.

    Raises SourceFailure, with a readable reason, for anything that can't be decoded as video. A hostile file may crash
    the decoder and with it this process: use `process.analyse_guarded` for untrusted files.
    """
    started = time.process_time()
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # one thread per source: sources are decoded side by side
    try:
        info, index = read_source(path), read_packets(path)
        demuxed = time.process_time()
        analysis = _decode(_Request(path, config, info, index, taken, window, spans))
        timing = {"demux": demuxed - started, "decode_and_analyse": time.process_time() - demuxed}
        return replace(analysis, timing=timing)
    finally:
        cv2.setNumThreads(threads)


@dataclass(frozen=True)
class _Request:
    """What is to be analysed: the arguments of `analyse`, and what demuxing showed."""

    path: Path
    config: CurationConfig
    info: SourceInfo
    index: PacketIndex
    taken: Taken
    window: Window | None
    spans: Sequence[Seconds]


def _decode(request: _Request) -> SourceAnalysis:
    """Try the cheapest pass first: without frames that no other refers to; then all frames; then without timestamps."""
    try:
        return _DecodePass(request, skipping=request.info.codec in SKIPPING_CODECS).run()
    except _UnexpectedError:
        pass
    try:
        return _DecodePass(request, skipping=False).run()
    except _UnexpectedError:
        return _DecodePass(replace(request, index=request.index.without_timestamps()), skipping=False).run()


class _UnexpectedError(Exception):
    """The decoder gives other frames than expected: the pass must start over in a simpler way.

    Frames may come in another order than their timestamps, as with B-frames in AVI. While frames are skipped, others
    than those may be missing.
    """


class _DecodePass:
    """The state of one decode pass over a source."""

    def __init__(self, request: _Request, skipping: bool) -> None:
        config, info, index, window = request.config, request.info, request.index, request.window
        self.config, self.info, self.index, self.taken = config, info, index, request.taken
        self.spans = request.spans
        self.rate = info.fps(index)
        # Without usable timestamps frames are counted: the clock ticks once per frame.
        self.base = index.time_base if index.trusted else 1 / self.rate
        self.skipped = self._skippable() if skipping else np.zeros(0, np.int64)
        self.decoder = FrameDecoder(request.path, self.skipped.tolist())
        self.numbering = Numbering(self.skipped)
        self.keyframes = np.searchsorted(index.shown(), np.sort(index.pts[index.keyframe]))
        self.decoded_twice = DecodedTwice(self.keyframes)
        self.finder = CutFinder(config.cuts, float(self.rate), self._look_again, window or ())
        self.sampler: Sampler | None = None
        self.motion: list[
            np.ndarray
        ] = []  # (n, 4) per chunk: camera motion between neighbouring frames, from frame 0 on
        self.cuts: list[Cut] = []
        self.clips: list[ClipAnalysis] = []
        self.dropped: list[DroppedSpan] = []
        self._first = window[0] if window else 0
        self._end_frame = window[1] if window else None
        self._inherited = False
        self._shot_start = self._first
        self._shot_cut: int | None = None

    def _skippable(self) -> np.ndarray:
        """Return the timestamps of the frames that need not be decoded."""
        stride = scored_stride(self.config.cuts, float(self.rate))
        sampled = sampled_times(self.config.motion, self.index.shown(), float(self.base))
        return skippable(self.index, stride, sampled)

    def run(self) -> SourceAnalysis:
        """Decode the source; a shot is closed as soon as the cut at its end is certain."""
        checked = 0.0
        for frame in self.decoder:
            number, seconds = self._number(frame)
            if self.sampler is None:
                self.sampler = self._sampler()
                checked = seconds
            if self.finder.add(number, seconds, frame) and self.decoded_twice.grows_too_large(number):
                self.decoder.skippable = frozenset()
            self.sampler.add(number, seconds, frame)
            if seconds - checked >= CHUNK_SECONDS:
                checked = seconds
                self._settle()
        return self._finish()

    def _sampler(self) -> Sampler:
        """Return the sampler for what the first frame shows; raises SourceFailure for HDR that isn't wanted."""
        showing = self.decoder.facts.showing
        if showing.hdr and self.config.hdr == "refuse":
            raise SourceFailure(f"its pictures are HDR ({showing.hdr}): 'curation.hdr: tonemap' takes such videos")
        geometry = DisplayGeometry(showing.orientation, showing.size(self.info.width, self.info.height))
        return Sampler(self.config.motion, geometry, showing)

    def _number(self, frame: DecodedFrame) -> tuple[int, float]:
        """Return number and time of a decoded frame."""
        known = self.numbering.pts
        pts = len(known) if not self.index.trusted else frame.pts
        if pts is None or (known and pts <= known[-1]) or (len(self.skipped) and self.decoder.facts.errors):
            raise _UnexpectedError
        return self.numbering.add(pts), self._seconds(pts)

    def _seconds(self, pts: int) -> float:
        return pts * self.base.numerator / self.base.denominator

    def _look_again(self, steps: list[Step]) -> Iterator[list[Look]]:
        """Decode all frames of each step; steps after the same keyframe are decoded in one go."""
        pts, keyframes = self.numbering.pts, self._timeline().keyframes

        def keyframe(step: Step) -> int:
            return int(np.searchsorted(keyframes, step[0], side="right")) - 1

        for place, group in itertools.groupby(steps, key=keyframe):
            together = list(group)
            wanted = {pts[n]: n for before, after in together for n in range(before, after + 1)}
            frames = self.decoder.again(pts[keyframes[max(place, 0)]], wanted)
            try:
                looks = {wanted[p.pts]: p.small for p in frames if p.pts is not None}
            except (av.error.FFmpegError, OSError):
                raise _UnexpectedError from None
            if len(looks) < len(wanted):
                raise _UnexpectedError
            for before, after in together:
                yield [(n, self._seconds(pts[n]), looks[n]) for n in range(before, after + 1)]

    def _timeline(self) -> Timeline:
        """Return the timeline of the frames decoded so far."""
        pts = np.array(self.numbering.pts, np.int64)
        return Timeline(pts, self._end(pts), self.index, self.base)

    def _end(self, pts: np.ndarray) -> int:
        """Return the timestamp at which the last frame ends; an implausible duration is replaced by a usual step."""
        step = int(np.median(np.diff(pts))) if len(pts) > 1 else 1
        last = self.index.last_duration if self.index.trusted else 1
        return int(pts[-1]) + (last if 0 < last <= 4 * step else max(step, 1))

    def _settle(self, final: bool = False) -> None:
        """Take the cuts that are certain by now and close the shots before them."""
        timeline = self._timeline()
        cuts, motion = self.finder.settle(final)
        self.motion.append(motion)
        for found in cuts:
            self._close(found, timeline)
        assert self.sampler is not None
        self.sampler.thin(self.finder.settled)

    def _close(self, found: Found, timeline: Timeline) -> None:
        """Record a certain cut and complete the shot before it."""
        start, last = max(found.start, self._shot_start), self._last(timeline)
        inherited = 0 < start <= self._first
        known = found.end <= self._shot_start and bool(self.cuts) and not inherited
        if known or start > last or (inherited and self._keyframe_before_first(found.end)):
            return
        if inherited:
            self.cuts.clear()  # of several cuts before the window only the last one counts
        self._inherited |= inherited
        number = len(self.cuts)
        self.cuts.append(self._cut(found, start, timeline))
        self._shot(ShotSpan(self._shot_start, start, self._shot_cut, number), timeline)
        if min(found.end, last) > start:
            self.dropped.append(self._transition(start, min(found.end, last), found.kind, timeline))
        self._shot_start, self._shot_cut = max(found.end, self._first), number
        assert self.sampler is not None
        self.sampler.forget(found.end)

    def _keyframe_before_first(self, frame: int) -> bool:
        """Say whether the shot that starts at `frame` may have clips before the window."""
        return bool(((self.keyframes >= frame) & (self.keyframes < self._first)).any())

    def _last(self, timeline: Timeline) -> int:
        """Return the end of the frames that count and are known."""
        known = len(timeline.pts)
        return known if self._end_frame is None else min(self._end_frame, known)

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

    def _shot(self, shot: ShotSpan, timeline: Timeline) -> None:
        """Cut a shot into clips with their samples; what is left of it is dropped with a reason."""
        if shot.end <= shot.start:
            return
        planner = SpanPlanner(timeline, self.config.clips, copyable=self.info.codec in COPY_CODECS)
        motion = np.concatenate(self.motion) * float(self.rate)
        inside, outside = pieces(shot, timeline, self.spans)
        self.dropped += [planner.drop(one.start, one.end, "outside the spans of its list") for one in outside]
        for piece in inside:
            spans, dropped = planner.plan(piece)
            self.dropped += dropped
            for span in spans:
                self._clip(span, planner, motion[span.start_frame : span.end_frame - 1])

    def _clip(self, span: ClipSpan, planner: SpanPlanner, motion: np.ndarray) -> None:
        """Complete a clip with its samples; motion: as in `Sampler.take`."""
        assert self.sampler is not None
        samples = self.sampler.take(span, motion, float(self.rate))
        if samples is None:
            self.dropped.append(planner.drop(span.start_frame, span.end_frame, "no frame could be sampled"))
        else:
            self.clips.append(self.taken(ClipAnalysis(span=span, **vars(samples))))

    def _finish(self) -> SourceAnalysis:
        """Close the last shot and return the whole analysis."""
        if len(self.numbering.pts) < 2 or self.sampler is None:
            raise SourceFailure("a single frame is no video")
        timeline = self._timeline()
        if len(self.skipped):
            shown = self.index.shown()
            if not np.array_equal(timeline.pts, shown[shown >= timeline.pts[0]]):
                raise _UnexpectedError
        self._settle(final=True)
        self._shot(ShotSpan(self._shot_start, self._last(timeline), self._shot_cut, None), timeline)
        self.dropped.sort(key=lambda d: d.start_frame)
        return SourceAnalysis(
            self._facts(timeline), self.cuts, self.clips, self.dropped, inherited=int(self._inherited)
        )

    def _facts(self, timeline: Timeline) -> SourceFacts:
        """Return the facts of the source, as far as the decoder got."""
        facts, info = self.decoder.facts, self.info
        duration = (timeline.end_pts - int(timeline.pts[0])) * float(self.base)
        if duration <= 0:
            raise SourceFailure("its timestamps don't advance")
        warnings = list(self.index.warnings)
        if facts.errors:
            warnings.append(f"{facts.errors} packets can't be decoded")
        width, height = facts.showing.size(info.width, info.height)
        return SourceFacts(
            container=info.container,
            codec=info.codec,
            pixel_format=facts.pixel_format,
            transfer=facts.transfer,
            width=info.width,
            height=info.height,
            display_width=width,
            display_height=height,
            orientation=facts.showing.orientation,
            sample_aspect=facts.showing.aspect,
            interlaced=facts.interlaced,
            fps=len(timeline.pts) / duration,
            variable_frame_rate=varies(np.diff(timeline.pts)),
            time_base=Fraction(self.base),
            start_pts=int(timeline.pts[0]),
            end_pts=timeline.end_pts,
            duration=duration,
            frames=len(timeline.pts),
            bit_rate=round(8 * float(self.index.size.sum()) / duration),
            b_frames=bool((np.diff(self.index.pts) < 0).any()) if self.index.trusted else False,
            keyframes=tuple(int(timeline.pts[k]) for k in timeline.keyframes),
            warnings=tuple(warnings),
            decoded_share=self._decoded_share(duration),
        )

    def _decoded_share(self, seconds: float) -> float | None:
        """Return which share of the declared duration was decoded: what is missing at the end or broken is not."""
        if self.info.declared <= 0:
            return None
        broken = self.decoder.facts.errors / len(self.index.pts)
        return min(seconds / self.info.declared, 1.0) * max(1 - broken, 0.0)
