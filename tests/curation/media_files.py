"""Video files of every awkward kind, made on the spot; each frame can be told from every other."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from svd.config import CurationConfig
from svd.config.load import load_preset

TINY = str(Path(__file__).resolve().parents[2] / "presets" / "tiny.yaml")  # also for tests that run elsewhere


def tiny_config(**changes: object) -> CurationConfig:
    """The curation section of the tiny preset with flow at 2 fps; keyword `section__key=value` changes one value."""
    overrides = {f"curation.{key.replace('__', '.')}": value for key, value in changes.items()}
    return load_preset(TINY, {"curation.motion.fps": 2} | overrides).curation


def scenery(seed: int, height: int, width: int) -> np.ndarray:
    """A (height, width, 3) uint8 picture with structure at all scales, different for each seed."""
    generator = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for cells in (3, 6, 12, 24):
        grid = generator.uniform(-1, 1, (cells, cells * 2, 3)).astype(np.float32)
        picture += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) * (40 / cells**0.3)
    base = generator.uniform(60, 190, 3).astype(np.float32)
    return np.clip(picture + base, 0, 255).astype(np.uint8)


def shots(
    lengths: list[int], height: int = 96, width: int = 128, seed: int = 0, speed: float = 1.0
) -> Iterator[np.ndarray]:
    """RGB frames of shots with hard cuts between; in each, a wide picture slides by `speed` pixels a frame."""
    for number, length in enumerate(lengths):
        wide = scenery(1000 * seed + number, height, width + int(abs(speed) * length) + 2)
        for i in range(length):
            x = speed * i
            left = int(x)
            part = wide[:, left : left + width + 1].astype(np.float32)
            yield np.rint(part[:, :-1] * (1 - x + left) + part[:, 1:] * (x - left)).astype(np.uint8)


Matrix = tuple[int, int, int, int]
# a, b, c, d of display matrices: the point (p, q) of the coded picture is shown at (a p + c q, b p + d q).
MATRICES: dict[str, Matrix] = {
    "plain": (1, 0, 0, 1),
    "clockwise": (0, 1, -1, 0),
    "half-turn": (-1, 0, 0, -1),
    "counterclockwise": (0, -1, 1, 0),
    "left-right": (-1, 0, 0, 1),
    "top-bottom": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed-half-turn": (0, -1, -1, 0),
}


def shown(picture: np.ndarray, matrix: Matrix) -> np.ndarray:
    """A coded picture as a player shows it, pixel by pixel after the matrix's definition."""
    a, b, c, d = matrix
    q, p = np.indices(picture.shape[:2])
    x, y = a * p + c * q, b * p + d * q
    x, y = x - x.min(), y - y.min()
    result = np.zeros((y.max() + 1, x.max() + 1, *picture.shape[2:]), picture.dtype)
    result[y, x] = picture
    return result


def coded(picture: np.ndarray, matrix: Matrix) -> np.ndarray:
    """The picture to encode, so that a player shows `picture`: the matrix is orthogonal, its inverse its transpose."""
    a, b, c, d = matrix
    return shown(picture, (a, c, b, d))


@dataclass(frozen=True)
class Kind:
    """How a file is encoded.

    pts: timestamp of each frame in 1/fps steps; None: 0, 1, 2, …; matrix: MP4 files only. colours: FFmpeg's numbers of
    matrix, primaries, transfer characteristic and range, stated and kept to; None: unmarked.
    """

    suffix: str = "mp4"
    codec: str = "libx264"
    gop: int = 12
    b_frames: int = 0
    options: dict[str, str] = field(default_factory=dict)
    pixel_format: str = "yuv420p"
    pts: list[int] | None = None
    rotation: int = 0
    matrix: Matrix | None = None
    aspect: Fraction | None = None
    interlaced: bool = False
    colours: tuple[int, int, int, int] | None = None
    container_options: dict[str, str] = field(default_factory=dict)
    audio: bool = False


def write(path: Path, frames: list[np.ndarray], fps: int | Fraction = 24, kind: Kind = Kind()) -> Path:
    """Encode RGB frames; returns the path with the kind's suffix."""
    path = path.with_suffix(f".{kind.suffix}")
    with av.open(str(path), "w", options=kind.container_options) as container:
        stream = container.add_stream(kind.codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = kind.pixel_format
        context = stream.codec_context
        context.thread_count = 1
        context.gop_size = kind.gop
        context.max_b_frames = kind.b_frames
        context.time_base = Fraction(1, fps)
        if kind.aspect is not None:
            context.sample_aspect_ratio = kind.aspect
        preset = {"preset": "veryfast", "crf": "18"} if kind.codec in ("libx264", "libx265") else {}
        context.options = {**preset, **kind.options}
        if kind.rotation:
            stream.set_display_rotation(kind.rotation)
        if kind.colours is not None:
            context.colorspace, context.color_primaries, context.color_trc, context.color_range = kind.colours
        sound = container.add_stream("aac", rate=48000) if kind.audio else None
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if kind.colours is not None:
                matrix, _, _, scope = kind.colours
                frame = frame.reformat(format=kind.pixel_format, dst_colorspace=matrix, dst_color_range=scope)
            frame.pts = kind.pts[i] if kind.pts else i
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _silence(container, sound, len(frames) / float(fps))
    if kind.matrix is not None:
        set_matrix(path, kind.matrix)
    return path


def set_matrix(path: Path, matrix: Matrix) -> None:
    """Write a display matrix into the track header of an MP4 file."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    at = data.find(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def _silence(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, int(48000 * seconds)), np.float32), format="flt", layout="mono")
    frame.sample_rate = 48000
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def decode_rgb(path: Path) -> list[np.ndarray]:
    """All frames in display order, (H, W, 3) uint8."""
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
