"""Writing clips: copying packets where a clip begins with a keyframe, else re-encoding its frames exactly.

Equal inputs give equal bytes: no time, no encoder name and no thread count enters a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import av.container
import av.error
import av.filter

from svd.core.files import atomic_file
from svd.curation.decoding.probe import UNTRUSTED, Opened, open_video, packets_from
from svd.curation.types import ClipFile, ClipSpan, SourceFacts, SourceFailure

# x264's choice of instructions by machine leaves random bytes behind some slices; a fixed set gives equal bytes
# anywhere.
ENCODER = {"preset": "veryfast", "crf": "17", "x264-params": "asm=SSE4.2", "flags": "+bitexact"}

_LIMITED_RANGE = 1


def write_clip(source: Path, span: ClipSpan, facts: SourceFacts, target: Path) -> ClipFile:
    """Write one clip of `source` as an MP4 file without audio; see write_clips."""
    return write_clips(source, facts, [(span, target)])[0]


def write_clips(source: Path, facts: SourceFacts, jobs: Sequence[tuple[ClipSpan, Path]]) -> list[ClipFile]:
    """Write clips of one source; each file appears under its name when it is complete.

    Copied clips keep the source's coding, display matrix and pixel aspect; re-encoded ones are H.264, upright and
    unmirrored, progressive, with square pixels. Raises SourceFailure when the source no longer decodes to the frames of
    a span.
    """
    written = []
    with open_video(source) as opened:
        for span, target in jobs:
            try:
                with atomic_file(target) as temporary:
                    written.append(_write(source, opened, span, facts, temporary))
            except (av.error.FFmpegError, ValueError) as error:
                raise SourceFailure(f"clip at {span.start_seconds:.3f} s can't be written: {error}") from None
    return written


def _write(source: Path, opened: Opened, span: ClipSpan, facts: SourceFacts, target: Path) -> ClipFile:
    copy = span.method == "copy"
    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    with av.open(str(target), "w", format="mp4", options=options) as output:
        if copy:
            count, width, height = _copy(source, opened, span, output), facts.width, facts.height
        else:
            count = _encode(source, span, facts, output)
            width, height = upright_size(facts)
    if count != span.frames:
        raise SourceFailure(
            f"clip at {span.start_seconds:.3f} s has {count} frames instead of {span.frames}: the source has changed"
        )
    seconds = span.end_seconds - span.start_seconds
    codec = facts.codec if copy else "h264"
    return ClipFile(count, target.stat().st_size, span.method, width, height, seconds, codec)


def upright_size(facts: SourceFacts) -> tuple[int, int]:
    """Width and height of a re-encoded clip: upright, square pixels, even."""
    return max(2, facts.display_width // 2 * 2), max(2, facts.display_height // 2 * 2)


def _copy(source: Path, opened: Opened, span: ClipSpan, output: av.container.OutputContainer) -> int:
    track: av.VideoStream | None = None
    waiting: list[av.Packet] = []
    count = 0
    for packet, stream in packets_from(source, span.start_pts, opened):
        if packet.pts is None or packet.size == 0:
            continue
        if packet.pts >= span.end_pts:
            break
        if packet.pts < span.start_pts:
            continue  # leading pictures of an open group belong to the shot before
        if track is None:
            track = output.add_stream_from_template(stream)
            track.time_base = stream.time_base
        waiting.append(packet)
        count += 1
        if packet.dts is not None:
            _mux(waiting, packet.dts, span.start_pts, track, output)
    if waiting and track is not None:
        _mux(waiting, max(p.pts or 0 for p in waiting), span.start_pts, track, output)
    return count


def _mux(
    waiting: list[av.Packet], last: int, start: int, track: av.VideoStream, output: av.container.OutputContainer
) -> None:
    """Write the waiting packets; those that came without a decoding time (Matroska's first) get times before `last`."""
    for behind, packet in enumerate(reversed(waiting)):
        step = max(int(packet.duration or 1), 1)
        packet.dts = last - behind * step - start
    for packet in waiting:
        packet.pts = (packet.pts or 0) - start
        packet.stream = track
        output.mux(packet)
    waiting.clear()


def _frames(source: Path, span: ClipSpan, facts: SourceFacts) -> Iterator[av.VideoFrame]:
    """The decoded frames of a span, decoded from the last keyframe before it."""
    earlier = [k for k in facts.keyframes if k <= span.start_pts]
    for packet, _ in packets_from(source, earlier[-1] if earlier else None):
        for frame in _decoded(packet):
            if frame.pts is None or frame.pts < span.start_pts:
                continue
            if frame.pts >= span.end_pts:
                return
            yield frame


def _counted(source: Path, span: ClipSpan) -> Iterator[av.VideoFrame]:
    """The decoded frames of a span of a source without usable timestamps: counted from its beginning."""
    number = 0
    for packet, _ in packets_from(source, None):
        for frame in _decoded(packet):
            if number >= span.end_frame:
                return
            if number >= span.start_frame:
                yield frame
            number += 1


def _decoded(packet: av.Packet) -> list[av.VideoFrame]:
    try:
        return list(packet.decode())
    except av.error.InvalidDataError:
        return []  # the analysis skipped the same broken packet


def _chain(frame: av.VideoFrame, facts: SourceFacts) -> av.filter.Graph:
    """De-interlacing, turning upright and square pixels, in this order."""
    graph = av.filter.Graph()
    base = frame.time_base or Fraction(1, 1000)
    nodes = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base)]
    if facts.interlaced:
        nodes.append(graph.add("bwdif", "mode=send_frame:deint=all"))
    nodes += [graph.add(name, arguments or None) for name, arguments in facts.orientation.filters()]
    width, height = upright_size(facts)
    nodes.append(graph.add("scale", f"{width}:{height}:flags=bicubic+accurate_rnd:out_range=tv"))
    nodes += [graph.add("setsar", "1"), graph.add("format", "yuv420p"), graph.add("buffersink")]
    for one, other in itertools.pairwise(nodes):
        one.link_to(other)
    graph.configure()
    return graph


def _encode(source: Path, span: ClipSpan, facts: SourceFacts, output: av.container.OutputContainer) -> int:
    ordinal = UNTRUSTED in facts.warnings
    frames = _counted(source, span) if ordinal else _frames(source, span, facts)
    track = output.add_stream("libx264", rate=Fraction(facts.fps).limit_denominator(1001))
    assert isinstance(track, av.VideoStream)
    track.width, track.height = upright_size(facts)
    track.pix_fmt = "yuv420p"
    context = track.codec_context
    context.thread_count = 1
    context.time_base = facts.time_base
    context.options = dict(ENCODER)
    context.color_range = _LIMITED_RANGE
    times: list[int] = []
    graph: av.filter.Graph | None = None
    count = 0
    for frame in frames:
        times.append(span.start_pts + len(times) if ordinal else int(frame.pts or 0))
        if graph is None:
            graph = _chain(frame, facts)
            context.colorspace, context.color_primaries = frame.colorspace, frame.color_primaries
            context.color_trc = frame.color_trc
        graph.push(frame)
        count += _drain(graph, times, count, span, facts, track, output)
    if graph is not None:
        graph.push(None)
        count += _drain(graph, times, count, span, facts, track, output)
    output.mux(track.encode(None))
    return count


def _drain(
    graph: av.filter.Graph,
    times: list[int],
    done: int,
    span: ClipSpan,
    facts: SourceFacts,
    track: av.VideoStream,
    output: av.container.OutputContainer,
) -> int:
    count = 0
    while True:
        try:
            frame = graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return count
        assert isinstance(frame, av.VideoFrame)
        frame.time_base = facts.time_base
        frame.pts = times[done + count] - span.start_pts
        output.mux(track.encode(frame))
        count += 1
