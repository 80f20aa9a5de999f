"""Encoding of synthetic videos with control over keyframes and B-frames; equal frames and options give equal bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from svd.core.files import atomic_file

# With B-frames, x264's own choice of instructions leaves a few random bytes at the end of some slices (the frames are
# equal, the files are not). A fixed set, which every x86-64 machine has, gives equal bytes on every run and machine.
X264_ASSEMBLY = "asm=SSE4.2"


@dataclass(frozen=True)
class Encoding:
    """How a video is encoded: codec, greatest distance of keyframes, B-frames between references, and its options."""

    codec: str = "libx264"
    keyframe_interval: int = 12
    b_frames: int = 0
    options: tuple[tuple[str, str], ...] = (("preset", "veryfast"), ("crf", "16"), ("x264-params", X264_ASSEMBLY))


XVID = Encoding(codec="mpeg4", options=(("qscale", "3"), ("flags", "+qscale")))


def encode_video(path: Path, frames: Iterable[NDArray[np.uint8]], fps: int, encoding: Encoding) -> None:
    """Encode (H, W, 3) uint8 RGB frames with even sides; the file appears under its name only when it is complete."""
    with (
        atomic_file(path) as temporary,
        av.open(str(temporary), "w", format=path.suffix[1:], options={"fflags": "+bitexact"}) as container,
    ):
        stream = container.add_stream(encoding.codec, rate=Fraction(fps))
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # more threads change the bytes
        context.gop_size = encoding.keyframe_interval
        context.max_b_frames = encoding.b_frames
        options = dict(encoding.options)
        context.options = {**options, "flags": options.get("flags", "") + "+bitexact"}
        for index, pixels in enumerate(frames):
            if index == 0:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
