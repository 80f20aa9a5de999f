"""Decoding: frames in display order, with planes halved by area and no colour conversion at full size.

Frames that no other frame refers to are not deblocked: no error can spread, and it saves a tenth of the decode. Such
frames can also be skipped altogether (svd/curation/decoding/skipping.py).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import av.error
import cv2
import numpy as np

from svd.curation.base.types import SourceFailure
from svd.curation.decoding.probe import open_video, packets_from
from svd.media.orientation import UPRIGHT, Orientation, orientation_of

SCORE_WIDTH = 320  # images are halved until they are narrower than this
FRAME_WIDTH = 768  # sampled frames are at most this wide: subtitles of 24 px at 720p stay readable
MAX_ERROR_SHARE = 0.5  # of packets that can't be decoded
EARLY_FRAMES = 48  # their majority decides whether a source is interlaced: in telecined film only some frames are
Planes = tuple[np.ndarray, np.ndarray, np.ndarray]  # Y, U, V
_PLANAR_420 = ("yuv420p", "yuvj420p")


class DecodedFrame:
    """A decoded frame; its planes Y, U, V (uint8) are computed only when they are needed.

    full: as coded, U and V of half size. small: halved to less than SCORE_WIDTH, Y (h, w) with even sides.
    """

    def __init__(self, frame: av.VideoFrame, count: int, size: tuple[int, int] | None) -> None:
        self.pts: int | None = frame.pts
        self.key = bool(frame.key_frame)
        self._frame, self._count, self._size = frame, count, size

    @functools.cached_property
    def full(self) -> Planes:
        """Return the planes as coded, as views into the decoder's memory."""
        return _planes(self._frame)

    @functools.cached_property
    def small(self) -> Planes:
        """Return the planes halved for scoring, at the size of the first frame if the stream changes its size."""
        small = _shrink(self.full, self._count)
        if self._size is None or small[0].shape == self._size:
            return small
        height, width = self._size
        chroma = (width // 2, height // 2)
        return cv2.resize(small[0], (width, height)), cv2.resize(small[1], chroma), cv2.resize(small[2], chroma)


@dataclass
class DecodeFacts:
    """Facts that only decoding shows; filled while frames are read."""

    orientation: Orientation = UPRIGHT
    interlaced: bool = False
    pixel_format: str = ""
    full_range: bool = False
    bt709: bool = False
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


def _planes(frame: av.VideoFrame) -> Planes:
    """Return Y, U and V of a frame in 8-bit 4:2:0."""
    if frame.format.name not in _PLANAR_420:
        # Rare formats (10 bit, 4:2:2, RGB, palettes) cost one conversion by swscale.
        frame = frame.reformat(format="yuv420p")
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
                    yield self._decoded(frame, first=frames == 1)
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
                    yield DecodedFrame(frame, self._count, self._size)
                if not missing or (frame.pts or 0) >= last:
                    return

    def _decode(self, packet: av.Packet) -> list[av.VideoFrame]:
        """Decode a packet; a broken one is counted and gives no frame."""
        try:
            return list(packet.decode())
        except (av.error.FFmpegError, ValueError):
            self.facts.errors += 1
            return []

    def _decoded(self, frame: av.VideoFrame, first: bool) -> DecodedFrame:
        """Wrap a frame and note the facts that it shows."""
        if first:
            self._learn(frame)
        if self._seen < EARLY_FRAMES:
            self._seen += 1
            self._interlaced += bool(frame.interlaced_frame)
            self.facts.interlaced = 2 * self._interlaced > self._seen
        decoded = DecodedFrame(frame, self._count, self._size)
        if self._size is None:
            height, width = decoded.small[0].shape
            self._size = height, width
        return decoded

    def _learn(self, frame: av.VideoFrame) -> None:
        """Take the facts of the first frame, which hold for the whole source."""
        facts = self.facts
        facts.orientation = orientation_of(frame)
        facts.pixel_format = frame.format.name
        facts.full_range = frame.format.name.startswith("yuvj") or int(frame.color_range) == 2
        facts.bt709 = int(frame.colorspace) == 1 or (int(frame.colorspace) == 2 and frame.height >= 720)
        self._count = halvings(frame.width, frame.height)
        if frame.width < 16 or frame.height < 16:
            raise SourceFailure(f"{frame.width}x{frame.height} pixels are too small")


@functools.cache
def _tables(bt709: bool, full_range: bool) -> tuple[np.ndarray, ...]:
    """Make int16 tables of 256 entries: what Y adds to all channels, V to red, U and V to green, U to blue."""
    red, blue = (0.2126, 0.0722) if bt709 else (0.299, 0.114)
    green = 1 - red - blue
    luma, colour, black = (1.0, 1.0, 0.0) if full_range else (255 / 219, 255 / 224, 16.0)
    u, v = 2 * (1 - blue) * colour, 2 * (1 - red) * colour
    code = np.arange(256)
    parts = luma * (code - black), v * (code - 128), -u * blue / green * (code - 128), -v * red / green * (code - 128)
    return tuple(np.rint(part).astype(np.int16) for part in (*parts, u * (code - 128)))


def to_rgb(planes: Planes, facts: DecodeFacts) -> np.ndarray:
    """Convert Y (h, w), U and V (h/2, w/2) uint8 to RGB (h, w, 3) uint8 by the matrix and range of the source."""
    luma, blue, red = planes
    size = luma.shape[1], luma.shape[0]
    y, v_red, u_green, v_green, u_blue = _tables(facts.bt709, facts.full_range)
    brightness = cv2.LUT(luma, y)
    chroma = cv2.LUT(red, v_red), cv2.LUT(blue, u_green) + cv2.LUT(red, v_green), cv2.LUT(blue, u_blue)
    channels = [
        cv2.add(brightness, cv2.resize(c, size, interpolation=cv2.INTER_LINEAR), dtype=cv2.CV_8U) for c in chroma
    ]
    return cv2.merge(channels)
