"""Decoding: frames in display order, with planes halved by area and no colour conversion at full size.

Frames that no other frame refers to are not deblocked: no error can spread, and it saves a tenth of the decode. Such
frames can also be skipped altogether (svd/curation/decoding/skipping.py).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import cv2
import numpy as np

from svd.curation.base.types import SourceFailure
from svd.curation.decoding.probe import open_video, packets_from
from svd.media.shown import (
    BT709,
    BT2020,
    PLAIN,
    Showing,
    ShownFrame,
    pixel_aspect,
    showing_of,
    transfer_name,
    with_neighbours,
)

SCORE_WIDTH = 320  # images are halved until they are narrower than this
FRAME_WIDTH = 768  # sampled frames are at most this wide: subtitles of 24 px at 720p stay readable
MAX_ERROR_SHARE = 0.5  # of packets that can't be decoded
EARLY_FRAMES = 48  # their majority decides whether a source is interlaced: in telecined film only some frames are
Planes = tuple[np.ndarray, np.ndarray, np.ndarray]  # Y, U, V
_PLANAR_420 = ("yuv420p", "yuvj420p")
_WEIGHTS = {BT709: (0.2126, 0.0722), 4: (0.3, 0.11), 7: (0.212, 0.087), BT2020: (0.2627, 0.0593), 10: (0.2627, 0.0593)}


class DecodedFrame:
    """A decoded frame; its planes Y, U, V (uint8) are computed only when they are needed.

    Both are whole frames in ordinary colours, neither turned nor with square pixels. full: the coded size, U and V of
    half of it. small: halved to less than SCORE_WIDTH, Y (h, w) with even sides; of interlaced frames mostly one field.
    """

    def __init__(self, shown: ShownFrame, count: int, size: tuple[int, int] | None) -> None:
        self.pts: int | None = shown.frame.pts
        self.key = bool(shown.frame.key_frame)
        self._shown, self._count, self._size = shown, count, size

    @functools.cached_property
    def full(self) -> Planes:
        """Return the planes at the coded size, of most frames as views into the decoder's memory."""
        return _planes(self._shown.standard(), self._shown.showing)

    @functools.cached_property
    def small(self) -> Planes:
        """Return the planes halved for scoring, at the size of the first frame if the stream changes its size."""
        small = self._halved()
        if self._size is None or small[0].shape == self._size:
            return small
        height, width = self._size
        chroma = (width // 2, height // 2)
        return cv2.resize(small[0], (width, height)), cv2.resize(small[1], chroma), cv2.resize(small[2], chroma)

    def _halved(self) -> Planes:
        frame, showing = self._shown.frame, self._shown.showing
        if showing.hdr is None:
            return _shrink(_planes(frame, showing), self._count)
        # At full size tone mapping would cost several times a decode.
        size = frame.width >> self._count, frame.height >> self._count
        return _shrink(_planes(self._shown.standard(size, "AREA"), showing), 0)


@dataclass
class DecodeFacts:
    """Facts that only decoding shows; filled while frames are read."""

    showing: Showing = PLAIN
    interlaced: bool = False
    pixel_format: str = ""
    transfer: str | None = None
    errors: int = 0


def halve(plane: np.ndarray) -> np.ndarray:
    """Average each 2 × 2 block of an (H, W) uint8 plane; an odd last row or column is left out."""
    height, width = plane.shape
    size = (width // 2, height // 2)
    return cv2.resize(plane[: size[1] * 2, : size[0] * 2], size, interpolation=cv2.INTER_AREA)


def _plane(frame: av.VideoFrame, index: int) -> np.ndarray:
    """Return a plane as an (H, W) view without the padding of its rows."""
    plane = frame.planes[index]
    return np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]


def _planes(frame: av.VideoFrame, showing: Showing) -> Planes:
    """Return Y, U and V in 8-bit 4:2:0 of a frame in ordinary colours."""
    if frame.format.name not in _PLANAR_420:
        # Rare formats (10 bit, 4:2:2, RGB, palettes) cost one conversion by swscale.
        frame = frame.reformat(format="yuv420p", dst_colorspace=_matrix(showing) if frame.format.is_rgb else None)
    return _plane(frame, 0), _plane(frame, 1), _plane(frame, 2)


def halvings(width: int, height: int) -> int:
    """Return how often an image is halved for scoring; it stays at least 32 px high."""
    count = 0
    while width >> count >= SCORE_WIDTH and height >> (count + 1) >= 32:
        count += 1
    return count


def _reduce(plane: np.ndarray, count: int) -> np.ndarray:
    """Halve a plane `count` times.

    Of large planes every second row is read, of very large ones every fourth. Reading memory dominates the cost, the
    mean of fewer pixels is as good, and for interlaced frames the rows are those of one field.
    """
    if count < 2:
        return halve(plane) if count else plane
    rows = min(count - 1, 2)
    small = plane[:: 1 << rows]
    for _ in range(count - rows):
        small = halve(small)
    for _ in range(rows):
        # Linear interpolation to half the width is the mean of two neighbours, and faster than INTER_AREA.
        size = small.shape[1] // 2, small.shape[0]
        small = cv2.resize(small[:, : size[0] * 2], size, interpolation=cv2.INTER_LINEAR)
    return small


def _shrink(planes: Planes, count: int) -> Planes:
    """Halve all planes `count` times and crop them to matching even sizes."""
    luma, blue, red = (_reduce(plane, count) for plane in planes)
    height, width = min(luma.shape[0] // 2, blue.shape[0]), min(luma.shape[1] // 2, blue.shape[1])
    return luma[: height * 2, : width * 2], blue[:height, :width], red[:height, :width]


class FrameDecoder:
    """Iterates over the frames of a source in display order; `facts` is filled on the way.

    skippable: timestamps of frames that may be skipped when no other frame refers to them; may be emptied midway.
    Broken packets are counted and skipped. Raises SourceFailure when less than half of the packets decode.
    """

    def __init__(self, path: Path, skippable: Collection[int] = ()) -> None:
        self.path = path
        self.skippable = frozenset(skippable)
        self.facts = DecodeFacts()
        self._size: tuple[int, int] | None = None
        self._count = 0
        self._seen = self._interlaced = 0  # counts over the early frames

    def __iter__(self) -> Iterator[DecodedFrame]:
        for before, frame, after in with_neighbours(self._frames()):
            yield self._decoded(before, frame, after)

    def _frames(self) -> Iterator[av.VideoFrame]:
        """Yield the frames as the decoder gives them; the first one's facts are noted."""
        packets = frames = 0
        with open_video(self.path) as (container, stream):
            context = stream.codec_context
            context.options = {"skip_loop_filter": "noref"}
            demuxer = container.demux(stream)
            while True:
                try:
                    packet = next(demuxer, None)
                except (av.error.FFmpegError, OSError, ValueError):
                    self.facts.errors += 1
                    packet = None
                if packet is None:
                    break
                packets += packet.size > 0
                context.skip_frame = "NONREF" if packet.pts in self.skippable else "DEFAULT"
                for frame in self._decode(packet):
                    frames += 1
                    if frames == 1:
                        self._learn(frame, pixel_aspect(stream))
                    yield frame
        if frames < 2:
            raise SourceFailure("no frame can be decoded" if frames == 0 else "a single frame is no video")
        if self.facts.errors > MAX_ERROR_SHARE * packets:
            raise SourceFailure(f"{self.facts.errors} of {packets} packets can't be decoded")

    def again(self, keyframe: int, wanted: Collection[int]) -> Iterator[DecodedFrame]:
        """Decode the frames with the timestamps `wanted` once more; keyframe: timestamp of a keyframe before them."""
        missing, last = set(wanted), max(wanted)
        for packet, stream in packets_from(self.path, keyframe):
            context = stream.codec_context
            if packet.pts == keyframe:
                context.options = {"skip_loop_filter": "noref"}
            context.skip_frame = "DEFAULT" if packet.pts in missing else "NONREF"
            for frame in self._decode(packet):
                if frame.pts in missing:
                    missing.remove(frame.pts)
                    yield DecodedFrame(ShownFrame(frame, self.facts.showing), self._count, self._size)
                if not missing or (frame.pts or 0) >= last:
                    return

    def _decode(self, packet: av.Packet) -> list[av.VideoFrame]:
        """Decode a packet; a broken one is counted and gives no frame."""
        try:
            return list(packet.decode())
        except (av.error.FFmpegError, ValueError):
            self.facts.errors += 1
            return []

    def _decoded(self, before: av.VideoFrame | None, frame: av.VideoFrame, after: av.VideoFrame | None) -> DecodedFrame:
        """Wrap a frame and note the facts that it shows."""
        if self._seen < EARLY_FRAMES:
            self._seen += 1
            self._interlaced += bool(frame.interlaced_frame)
            self.facts.interlaced = 2 * self._interlaced > self._seen
        decoded = DecodedFrame(ShownFrame(frame, self.facts.showing, before, after), self._count, self._size)
        if self._size is None:
            height, width = decoded.small[0].shape
            self._size = height, width
        return decoded

    def _learn(self, frame: av.VideoFrame, aspect: Fraction) -> None:
        """Take the facts of the first frame, which hold for the whole source."""
        self.facts.showing = showing_of(frame, aspect)
        self.facts.pixel_format = frame.format.name
        self.facts.transfer = transfer_name(frame)
        self._count = halvings(frame.width, frame.height)
        if frame.width < 16 or frame.height < 16:
            raise SourceFailure(f"{frame.width}x{frame.height} pixels are too small")


@functools.cache
def _tables(matrix: int, full_range: bool) -> tuple[np.ndarray, ...]:
    """Make int16 tables of 256 entries: what Y adds to all channels, V to red, U and V to green, U to blue."""
    red, blue = _WEIGHTS.get(matrix, (0.299, 0.114))
    green = 1 - red - blue
    luma, colour, black = (1.0, 1.0, 0.0) if full_range else (255 / 219, 255 / 224, 16.0)
    u, v = 2 * (1 - blue) * colour, 2 * (1 - red) * colour
    code = np.arange(256)
    parts = luma * (code - black), v * (code - 128), -u * blue / green * (code - 128), -v * red / green * (code - 128)
    return tuple(np.rint(part).astype(np.int16) for part in (*parts, u * (code - 128)))


def _matrix(showing: Showing) -> int:
    """Return the matrix of a frame's planes: HDR has been mapped to ordinary colours."""
    return BT709 if showing.hdr else showing.matrix


def to_rgb(planes: Planes, showing: Showing) -> np.ndarray:
    """Convert Y (h, w), U and V (h/2, w/2) uint8 of a DecodedFrame to RGB (h, w, 3) uint8."""
    luma, blue, red = planes
    size = luma.shape[1], luma.shape[0]
    y, v_red, u_green, v_green, u_blue = _tables(_matrix(showing), showing.full_range and not showing.hdr)
    brightness = cv2.LUT(luma, y)
    chroma = cv2.LUT(red, v_red), cv2.LUT(blue, u_green) + cv2.LUT(red, v_green), cv2.LUT(blue, u_blue)
    channels = [
        cv2.add(brightness, cv2.resize(c, size, interpolation=cv2.INTER_LINEAR), dtype=cv2.CV_8U) for c in chroma
    ]
    return cv2.merge(channels)
