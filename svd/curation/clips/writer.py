"""Writing clips as MP4: packets are copied where a clip begins with a keyframe, else its frames are re-encoded.

Equal inputs give equal bytes: no time, no encoder name and no thread count enters a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import av.container
import av.error
import av.filter

from svd.core.files import atomic_file
from svd.curation.base.types import ClipFile, ClipSpan, SourceFacts, SourceFailure
from svd.curation.decoding.probe import UNTRUSTED, Opened, open_video, packets_from
from svd.media.shown import BT709, hdr_of, shown_frames

# x264 picks vector instructions by machine, and the newest leave random bytes behind some slices. A fixed set gives
# equal bytes on every machine.
ENCODER = {"preset": "veryfast", "crf": "17", "x264-params": "asm=SSE4.2", "flags": "+bitexact"}

_LIMITED_RANGE = 1  # AVCOL_RANGE_MPEG


def write_clip(source: Path, span: ClipSpan, facts: SourceFacts, target: Path) -> ClipFile:
    """Write one clip of `source`, without audio; see write_clips."""
    return write_clips(source, facts, [(span, target)])[0]


def write_clips(source: Path, facts: SourceFacts, jobs: Sequence[tuple[ClipSpan, Path]]) -> list[ClipFile]:
    """Write clips of one source; each file appears under its name when it is complete.

    Copied clips keep the source's coding, display matrix and pixel aspect. Re-encoded clips are H.264, upright and
    unmirrored, progressive, with square pixels. Raises SourceFailure when the source no longer decodes to the frames of
    a span.
    """
    with open_video(source) as opened:
        return [_write(source, opened, span, facts, target) for span, target in jobs]


def copy_frames(source: Path, span: ClipSpan, target: Path) -> int:
    """Copy the packets of the frames of `span` into an MP4 file; return the number of frames.

    It needs no facts of the source beyond its packets. Raises SourceFailure as write_clips does.
    """
    with open_video(source) as opened, _complete_mp4(span, target) as output:
        count = _copy(source, opened, span, output)
        _check_count(span, count)
    return count


def _write(source: Path, opened: Opened, span: ClipSpan, facts: SourceFacts, target: Path) -> ClipFile:
    """Write one clip and say what its file holds."""
    copied = span.method == "copy"
    with _complete_mp4(span, target) as output:
        count = _copy(source, opened, span, output) if copied else _encode(source, span, facts, output)
        _check_count(span, count)
    size = target.stat().st_size
    seconds = span.end_seconds - span.start_seconds
    if not copied:
        return ClipFile(
            count, size, "reencode", *upright_size(facts), seconds, "h264", "yuv420p", _encoded_transfer(facts)
        )
    return ClipFile(
        count,
        size,
        "copy",
        facts.display_width,
        facts.display_height,
        seconds,
        facts.codec,
        facts.pixel_format,
        facts.transfer,
        facts.sample_aspect,
        facts.orientation.rotation,
        facts.interlaced,
    )


def _encoded_transfer(facts: SourceFacts) -> str | None:
    """Return the transfer characteristic of re-encoded clips: that of the source, but BT.709 for HDR and RGB."""
    mapped = hdr_of(facts.transfer) or av.VideoFormat(facts.pixel_format).is_rgb
    return "bt709" if mapped else facts.transfer


@contextmanager
def _complete_mp4(span: ClipSpan, target: Path) -> Iterator[av.container.OutputContainer]:
    """Open an MP4 file that appears as `target` when the block ends without an error; raises SourceFailure."""
    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    try:
        with (
            atomic_file(target) as temporary,
            av.open(str(temporary), "w", format="mp4", options=options) as output,
        ):
            yield output
    except (av.error.FFmpegError, ValueError) as error:
        raise SourceFailure(f"clip at {span.start_seconds:.3f} s can't be written: {error}") from None


def _check_count(span: ClipSpan, count: int) -> None:
    """Raise SourceFailure unless as many frames were written as the span has."""
    if count != span.frames:
        raise SourceFailure(
            f"clip at {span.start_seconds:.3f} s has {count} frames instead of {span.frames}: the source has changed"
        )


def upright_size(facts: SourceFacts) -> tuple[int, int]:
    """Return width and height of a re-encoded clip: upright, square pixels, even."""
    return max(2, facts.display_width // 2 * 2), max(2, facts.display_height // 2 * 2)


def _copy(source: Path, opened: Opened, span: ClipSpan, output: av.container.OutputContainer) -> int:
    """Copy the packets of a span, with times from 0; return their number."""
    track: av.VideoStream | None = None
    waiting: list[av.Packet] = []
    count = 0
    for packet, stream in packets_from(source, span.start_pts, opened):
        if packet.pts is None or packet.size == 0:
            continue
        if packet.pts >= span.end_pts:
            break
        if packet.pts < span.start_pts:
            continue  # leading frames of an open group of pictures belong to the shot before
        if track is None:
            codec = stream.codec_context.codec
            # PyAV asks for an encoder of the decoder's name, which a library that only decodes (libdav1d) doesn't have.
            track = output.add_stream_from_template(stream, opaque=codec.name != codec.canonical_name)
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
    """Write the waiting packets; those without a decoding time (the first ones of Matroska) get times before `last`."""
    for behind, packet in enumerate(reversed(waiting)):
        step = max(int(packet.duration or 1), 1)
        packet.dts = last - behind * step - start
    for packet in waiting:
        packet.pts = (packet.pts or 0) - start
        packet.stream = track
        output.mux(packet)
    waiting.clear()


def _frames(source: Path, span: ClipSpan, facts: SourceFacts) -> Iterator[av.VideoFrame]:
    """Yield the frames of a span, decoded from the last keyframe before it."""
    earlier = [k for k in facts.keyframes if k <= span.start_pts]
    for packet, _ in packets_from(source, earlier[-1] if earlier else None):
        for frame in _decoded(packet):
            if frame.pts is None or frame.pts < span.start_pts:
                continue
            if frame.pts >= span.end_pts:
                return
            yield frame


def _counted(source: Path, span: ClipSpan) -> Iterator[av.VideoFrame]:
    """Yield the frames of a span of a source without usable timestamps, counted from the beginning of the source."""
    number = 0
    for packet, _ in packets_from(source, None):
        for frame in _decoded(packet):
            if number >= span.end_frame:
                return
            if number >= span.start_frame:
                yield frame
            number += 1


def _decoded(packet: av.Packet) -> list[av.VideoFrame]:
    """Decode a packet; a broken one gives no frame."""
    try:
        return list(packet.decode())
    except av.error.InvalidDataError:
        return []  # the decode pass skipped the same broken packet


def _chain(frame: av.VideoFrame, facts: SourceFacts) -> av.filter.Graph:
    """Build the filters of a re-encoded clip: turn upright, make pixels square."""
    graph = av.filter.Graph()
    base = frame.time_base or Fraction(1, 1000)
    nodes = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base)]
    nodes += [graph.add(name, arguments or None) for name, arguments in facts.orientation.filters()]
    width, height = upright_size(facts)
    matrix = ":out_color_matrix=bt709" if frame.format.is_rgb else ""
    nodes.append(graph.add("scale", f"{width}:{height}:flags=bicubic+accurate_rnd:out_range=tv{matrix}"))
    nodes += [graph.add("setsar", "1"), graph.add("format", "yuv420p"), graph.add("buffersink")]
    for one, other in itertools.pairwise(nodes):
        one.link_to(other)
    graph.configure()
    return graph


def _encode(source: Path, span: ClipSpan, facts: SourceFacts, output: av.container.OutputContainer) -> int:
    """Re-encode the frames of a span; return their number."""
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
    for shown in shown_frames(frames, facts.sample_aspect):
        times.append(span.start_pts + len(times) if ordinal else int(shown.frame.pts or 0))
        frame = shown.standard()
        if graph is None:
            graph = _chain(frame, facts)
            context.colorspace, context.color_primaries, context.color_trc = _colours(frame)
        graph.push(frame)
        count += _drain(graph, times, count, span, facts, track, output)
    if graph is not None:
        graph.push(None)
        count += _drain(graph, times, count, span, facts, track, output)
    output.mux(track.encode(None))
    return count


def _colours(frame: av.VideoFrame) -> tuple[int, int, int]:
    """Return matrix, primaries and transfer characteristic of the clip of a frame; RGB becomes BT.709."""
    if frame.format.is_rgb:
        return BT709, BT709, BT709  # the three lists of FFmpeg have the same number for it
    return frame.colorspace, frame.color_primaries, frame.color_trc


def _drain(
    graph: av.filter.Graph,
    times: list[int],
    done: int,
    span: ClipSpan,
    facts: SourceFacts,
    track: av.VideoStream,
    output: av.container.OutputContainer,
) -> int:
    """Encode the frames that the filters give back; `done` of the span's frames are already written."""
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
