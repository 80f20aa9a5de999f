"""From coded frames to the pictures that players show: whole frames, a screen's colours, square pixels, upright.

Every reader of video takes its pictures from here, so that what is scored, trained on, evaluated and looked at is the
same. A frame that is upright and progressive, with square pixels and ordinary colours, is only converted to RGB.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import av.error
import av.filter
import numpy as np
from av.video.reformatter import ColorTrc
from numpy.typing import NDArray

from svd.media.orientation import UPRIGHT, Orientation, orientation_of
from svd.media.tone_map import Hdr, tone_map

Frame = NDArray[Any]
Size = tuple[int, int]

BT709, BT601, BT2020 = 1, 5, 9  # FFmpeg's numbers of colour matrices
_MATRICES = (BT709, 4, BT601, 6, 7, BT2020, 10)
_FULL_RANGE = 2
HD_SIDE = 720  # players take the colours of unmarked video for BT.709 when its short side is at least this


@dataclass(frozen=True)
class Showing:
    """How the coded frames of a stream are shown.

    aspect: width of a pixel in heights. matrix: from RGB to YUV, in FFmpeg's numbers. full_range: luma from 0 to 255
    instead of 16 to 235. hdr: None for ordinary video.
    """

    orientation: Orientation = UPRIGHT
    aspect: Fraction = Fraction(1)
    matrix: int = BT601
    full_range: bool = False
    hdr: Hdr | None = None

    def square(self, width: int, height: int) -> Size:
        """Return the size of a coded picture with square pixels, not yet turned; a width that changes becomes even."""
        return (width, height) if self.aspect == 1 else (max(2, round(width * self.aspect / 2) * 2), height)

    def size(self, width: int, height: int) -> Size:
        """Return width and height of the shown picture of coded frames of this size."""
        return self.turned(self.square(width, height))

    def turned(self, size: Size) -> Size:
        """Convert a size of the picture as coded to that of the upright one, or back."""
        return (size[1], size[0]) if self.orientation.sideways else size


PLAIN = Showing()


def pixel_aspect(stream: av.VideoStream) -> Fraction:
    """Return the width of a stream's pixels in heights; 1 where the header gives none or nonsense."""
    aspect = Fraction(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    return aspect if Fraction(1, 8) <= aspect <= 8 else Fraction(1)


def transfer_name(frame: av.VideoFrame) -> str | None:
    """Return the transfer characteristic, such as "bt709", "smpte2084" (PQ) or "arib-std-b67" (HLG); None: unknown."""
    try:
        transfer = ColorTrc(int(frame.color_trc))
    except ValueError:
        return None
    return None if transfer is ColorTrc.UNSPECIFIED else transfer.name.lower().replace("_", "-")


def hdr_of(transfer: str | None) -> Hdr | None:
    """Return the kind of HDR by the name of the transfer characteristic; None for ordinary video."""
    kinds: dict[str | None, Hdr] = {"smpte2084": "PQ", "arib-std-b67": "HLG"}
    return kinds.get(transfer)


def showing_of(frame: av.VideoFrame, aspect: Fraction) -> Showing:
    """Return how the frames of a stream are shown, from its first frame and the aspect of its pixels."""
    guess = BT709 if min(frame.width, frame.height) >= HD_SIDE else BT601
    hdr = hdr_of(transfer_name(frame))
    return Showing(
        orientation=orientation_of(frame),
        aspect=aspect,
        matrix=int(frame.colorspace) if int(frame.colorspace) in _MATRICES else BT2020 if hdr else guess,
        full_range=frame.format.name.startswith("yuvj") or int(frame.color_range) == _FULL_RANGE,
        hdr=hdr,
    )


@dataclass(frozen=True)
class ShownFrame:
    """A decoded frame and how it is shown; its neighbours are only needed where it is interlaced."""

    frame: av.VideoFrame
    showing: Showing
    before: av.VideoFrame | None = None
    after: av.VideoFrame | None = None

    def standard(self, size: Size | None = None, interpolation: str | None = None) -> av.VideoFrame:
        """Return the frame progressive and in ordinary colours: HDR as RGB, any other as it is coded.

        size: of the result, not yet turned; it holds for HDR only, where it saves work.
        """
        frame = deinterlaced(self.before, self.frame, self.after) if self.frame.interlaced_frame else self.frame
        if self.showing.hdr is None:
            return frame
        width, height = size or (frame.width, frame.height)
        codes = self._converted(frame, (width, height), "rgb48le", interpolation)
        return av.VideoFrame.from_ndarray(
            tone_map(codes.to_ndarray().astype(np.uint16, copy=False), self.showing.hdr), format="rgb24"
        )

    def rgb(self, size: Size | None = None, interpolation: str = "BICUBIC") -> Frame:
        """Return the shown picture, (H, W, 3) uint8 RGB; size: width and height if not its own."""
        showing = self.showing
        square = showing.square(self.frame.width, self.frame.height)
        wanted = showing.turned(size) if size else square
        method = interpolation if size or square != (self.frame.width, self.frame.height) else None
        picture = self._converted(self.standard(wanted, method), wanted, "rgb24", method)
        return showing.orientation.upright(picture.to_ndarray())

    def _converted(self, frame: av.VideoFrame, size: Size, pixels: str, interpolation: str | None) -> av.VideoFrame:
        """Return a frame in another size and format; swscale knows the matrix of marked frames only."""
        unmarked = not frame.format.is_rgb and int(frame.colorspace) not in _MATRICES
        matrix = self.showing.matrix if unmarked else None
        return frame.reformat(*size, pixels, src_colorspace=matrix, interpolation=interpolation)


def with_neighbours(
    frames: Iterable[av.VideoFrame],
) -> Iterator[tuple[av.VideoFrame | None, av.VideoFrame, av.VideoFrame | None]]:
    """Yield each frame, an interlaced one between the frame before it and the one after it."""
    iterator = iter(frames)
    before, frame = None, next(iterator, None)
    while frame is not None:
        after = None
        if frame.interlaced_frame:
            after = next(iterator, None)
            yield before, frame, after
        else:
            yield None, frame, None
        before, frame = frame, next(iterator, None) if after is None else after


def shown_frames(frames: Iterable[av.VideoFrame], aspect: Fraction) -> Iterator[ShownFrame]:
    """Yield decoded frames, of which `aspect` is the pixels' aspect, with what shows them as players do.

    The orientation and colours of the first frame hold for all. Frames that nobody asks for are not converted.
    """
    showing: Showing | None = None
    for before, frame, after in with_neighbours(frames):
        showing = showing or showing_of(frame, aspect)
        yield ShownFrame(frame, showing, before, after)


def shown_rgb(
    container: av.container.InputContainer, wanted: Iterable[int] | None = None
) -> Iterator[tuple[int, Frame]]:
    """Decode the first video stream; yield number and shown picture, (H, W, 3) uint8 RGB, of all or `wanted` frames.

    Frames after the last wanted one are not decoded. Raises IndexError without a video stream, and PyAV's errors.
    """
    chosen = None if wanted is None else set(wanted)
    last = None if chosen is None else max(chosen)
    stream = container.streams.video[0]
    for number, shown in enumerate(shown_frames(container.decode(stream), pixel_aspect(stream))):
        if chosen is None or number in chosen:
            yield number, shown.rgb()
        if number == last:
            return


def deinterlaced(before: av.VideoFrame | None, frame: av.VideoFrame, after: av.VideoFrame | None) -> av.VideoFrame:
    """Return a frame with its later field interpolated (FFmpeg's bwdif), from it and such neighbours as there are."""
    graph = av.filter.Graph()
    graph.threads = 1
    base = frame.time_base or Fraction(1, 1000)
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base)
    for one, other in itertools.pairwise([source, graph.add("bwdif", "mode=send_frame"), graph.add("buffersink")]):
        one.link_to(other)
    graph.configure()
    layout = frame.width, frame.height, frame.format.name
    near = [n if n and (n.width, n.height, n.format.name) == layout else None for n in (before, after)]
    for part in (near[0], frame, near[1]):
        if part is not None:
            graph.push(part)
    if near[1] is None:
        graph.push(None)
    return _last(graph)


def _last(graph: av.filter.Graph) -> av.VideoFrame:
    """Return the newest frame of a filter graph."""
    frame: Any = graph.pull()
    while True:
        try:
            frame = graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return frame
