"""Opening a source and reading its packets without decoding: facts, keyframes, order of packets.

One demuxing pass costs about one percent of a decode. It shows what headers only promise: which packets there are,
their timestamps, and where decoding can start.
"""

from __future__ import annotations

import array
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.container
import av.error
import numpy as np

from svd.curation.base.types import SourceFailure

MAX_PIXELS = 1 << 26  # 67 megapixels; the largest level of H.264 allows 36
MAX_PACKETS = 20_000_000  # 92 hours at 60 fps
# Playlists can refer to other files and hosts; images and text are no videos.
REFUSED_FORMATS = ("hls", "dash", "concat", "tty", "image2", "_pipe", "lavfi", "ffmetadata", "webvtt", "srt", "ass")
UNTRUSTED = "timestamps are missing, repeated or run backwards; times follow from the frame rate"
TICK = Fraction(1, av.time_base)  # seconds; the unit of durations of containers
NO_TIMESTAMP = np.iinfo(np.int64).min
Opened = tuple[av.container.InputContainer, av.VideoStream]


@dataclass(frozen=True)
class PacketIndex:
    """The packets of the video stream in decoding order, as arrays of one length.

    pts, dts: in `time_base`, NO_TIMESTAMP where the container has none. size: bytes. keyframe: decoding can start here.
    discarded: packets that players don't show. trusted: False when timestamps are missing, repeated or run backwards.
    """

    pts: np.ndarray
    dts: np.ndarray
    size: np.ndarray
    keyframe: np.ndarray
    discarded: np.ndarray
    last_duration: int
    time_base: Fraction
    trusted: bool
    warnings: tuple[str, ...]

    def shown(self) -> np.ndarray:
        """Return the timestamps of the frames that a player shows, ascending."""
        return np.sort(self.pts[~self.discarded])

    def without_timestamps(self) -> PacketIndex:
        """Return the same packets with timestamps marked as unusable."""
        return replace(self, trusted=False, warnings=(*self.warnings, UNTRUSTED))


def _reason(error: Exception) -> str:
    """Return an error as one line."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def check_file(path: Path) -> None:
    """Raise SourceFailure unless `path` is a readable, regular, non-empty file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise SourceFailure("not a regular file")
        if status.st_size == 0:
            raise SourceFailure("the file is empty")
        with path.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise SourceFailure(f"the file can't be read: {_reason(error)}") from None


@contextmanager
def open_video(path: Path) -> Iterator[Opened]:
    """Yield the container and its video stream, with one decoding thread; closed at the end.

    Only local files are opened: a playlist can't lead elsewhere. Raises SourceFailure without a usable video stream.
    """
    check_file(path)
    try:
        # With the prefix "file:", names such as "concat:a|b" or "pipe:0" are not read as protocols.
        container = av.open(
            f"file:{path.absolute()}", options={"protocol_whitelist": "file"}, metadata_errors="replace"
        )
    except (av.error.FFmpegError, ValueError, OSError, UnicodeError) as error:
        raise SourceFailure(f"not a readable video: {_reason(error)}") from None
    with container:
        check_format(container)
        yield container, _video_stream(container)


@contextmanager
def open_stream(stream: Any) -> Iterator[Opened]:
    """Do what `open_video` does for an object with `read` and `seek`; it can't lead to any file."""
    try:
        container = av.open(stream, "r", options={"protocol_whitelist": "none"}, metadata_errors="replace")
    except (av.error.FFmpegError, ValueError, OSError, UnicodeError) as error:
        raise SourceFailure(f"not a readable video: {_reason(error)}") from None
    with container:
        check_format(container)
        yield container, _video_stream(container)


def check_format(container: av.container.InputContainer) -> None:
    """Raise SourceFailure for formats that are no videos, or name other files."""
    names = container.format.name.split(",")
    if any(n == refused or (refused[0] == "_" and n.endswith(refused)) for n in names for refused in REFUSED_FORMATS):
        raise SourceFailure(f"not a video but '{container.format.name}'")


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """Return the largest video stream that is no cover image; raises SourceFailure when it can't be decoded."""
    candidates = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not candidates:
        raise SourceFailure("no video stream")
    stream = max(candidates, key=lambda s: (s.codec_context is not None and s.width * s.height, -s.index))
    context = stream.codec_context
    if context is None:
        raise SourceFailure("a video codec that this build can't decode")
    if context.width <= 0 or context.height <= 0:
        raise SourceFailure("the header gives no picture size")
    if context.width * context.height > MAX_PIXELS:
        raise SourceFailure(f"{context.width}x{context.height} pixels are more than the limit of {MAX_PIXELS}")
    if not stream.time_base:
        raise SourceFailure("the video stream has no time base")
    context.thread_count = 1
    return stream


@dataclass(frozen=True)
class SourceInfo:
    """Facts from the header of the container; width × height are coded pixels, declared: seconds, 0 if not known."""

    container: str
    codec: str
    width: int
    height: int
    header_rate: Fraction
    declared: float

    def fps(self, index: PacketIndex) -> Fraction:
        """Return the frames per second: from timestamps when they can be trusted, else from the header, else 25."""
        if index.trusted:
            shown = index.shown()
            seconds = Fraction(int(shown[-1] - shown[0])) * index.time_base
            return Fraction(len(shown) - 1) / seconds
        return self.header_rate if 1 <= self.header_rate <= 480 else Fraction(25)


def read_source(path: Path) -> SourceInfo:
    """Read the facts from the header; raises SourceFailure when `path` is no readable video."""
    with open_video(path) as (container, stream):
        context = stream.codec_context
        rate = Fraction(stream.average_rate or stream.base_rate or 0)
        codec = context.codec.canonical_name  # its own name may be that of a library, such as libdav1d for av1
        ticks, base = (stream.duration, stream.time_base) if stream.duration else (container.duration, TICK)
        declared = float((ticks or 0) * (base or 0))
        return SourceInfo(container.format.name, codec, context.width, context.height, rate, declared)


def read_packets(path: Path) -> PacketIndex:
    """Demux the video stream of `path` once; raises SourceFailure when it holds fewer than two packets."""
    pts, dts, size = array.array("q"), array.array("q"), array.array("q")
    keyframe, discarded = bytearray(), bytearray()
    warnings: list[str] = []
    duration = 0
    with open_video(path) as (container, stream):
        base = Fraction(stream.time_base or 1)
        try:
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                pts.append(NO_TIMESTAMP if packet.pts is None else packet.pts)
                dts.append(NO_TIMESTAMP if packet.dts is None else packet.dts)
                size.append(packet.size)
                keyframe.append(packet.is_keyframe)
                discarded.append(packet.is_discard)
                duration = packet.duration or duration
                if len(pts) > MAX_PACKETS:
                    raise SourceFailure(f"more than {MAX_PACKETS} packets")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            warnings.append(f"the container breaks off: {_reason(error)}")
    if len(pts) < 2:
        raise SourceFailure("; ".join(("fewer than two frames", *warnings)))
    shown_at, decoded_at = np.frombuffer(pts, np.int64), np.frombuffer(dts, np.int64)
    hidden = np.frombuffer(bytes(discarded), np.bool_)
    trusted = _trusted(shown_at, decoded_at, hidden, base)
    if not trusted:
        warnings.append(UNTRUSTED)
    keys = np.frombuffer(bytes(keyframe), np.bool_)
    sizes = np.frombuffer(size, np.int64)
    return PacketIndex(shown_at, decoded_at, sizes, keys, hidden, duration, base, trusted, tuple(warnings))


def _trusted(pts: np.ndarray, dts: np.ndarray, hidden: np.ndarray, base: Fraction) -> bool:
    """Say whether timestamps are complete, ascend, and have no gap of an hour."""
    if (pts == NO_TIMESTAMP).any():
        return False
    decoding = dts[dts != NO_TIMESTAMP]
    shown = np.sort(pts[~hidden])
    if len(shown) < 2 or (np.diff(decoding) < 0).any() or (np.diff(shown) <= 0).any():
        return False
    seconds = np.diff(shown).astype(np.float64) * float(base)
    return bool(seconds.max() < 3600 and shown[-1] - shown[0] < 1 << 53)


def packets_from(
    source: Path, keyframe: int | None, opened: Opened | None = None
) -> Iterator[tuple[av.Packet, av.VideoStream]]:
    """Yield the packets in decoding order, from the keyframe with this timestamp on; None: from the beginning.

    Program and transport streams have no index, so a seek may land behind the wanted packet; then the source is read
    from the beginning. opened: the source if it is already open; opening costs as much as decoding four frames.
    """
    for seeking in (True, False) if keyframe is not None else (False,):
        found = keyframe is None
        with nullcontext(opened) if opened and seeking else open_video(source) as (container, stream):
            if seeking and keyframe is not None:
                container.seek(keyframe, stream=stream, backward=True, any_frame=False)
            for packet in container.demux(stream):
                if not found and packet.is_keyframe and packet.pts is not None and keyframe is not None:
                    found = packet.pts == keyframe
                    if seeking and packet.pts > keyframe:
                        break
                if found:
                    yield packet, stream
        if found:
            return
