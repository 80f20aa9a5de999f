"""Short clips as files: writing mp4 (H.264), GIF and PNG, reading them, and film strips for reports.

Frames are (T, H, W, 3) uint8 RGB everywhere in this module. Equal frames and options give equal bytes: the encoder
runs on one thread with bit-exact flags, and no time or host name is written.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from svd.core.errors import UserError
from svd.core.files import atomic_file
from svd.media.images import STILL_SUFFIXES, shown_image
from svd.media.shown import shown_rgb

Frames = NDArray[np.uint8]

_RATE_DENOMINATOR = 1001  # enough for the NTSC rates such as 30000/1001
_STILL_RATE = 25.0  # FFmpeg's rate of a single image


def _check(frames: Frames) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames must be a non-empty (T, H, W, 3) uint8 array, got {frames.shape} {frames.dtype}")


def _check_rate(fps: float) -> None:
    if not 0 < fps <= 1000:
        raise UserError(f"a frame rate must be above 0 and at most 1000 frames per second, got {fps}")


def write_mp4(
    path: Path,
    frames: Frames,
    fps: float,
    metadata: Mapping[str, str] | None = None,
    *,
    crf: int = 18,
    keyframe_interval: int | None = None,
) -> None:
    """Write `frames` as H.264 in an mp4 that browsers play (yuv420p, index in front).

    fps: frames per second. metadata: free keys; stored as one JSON object in the container's `comment` tag.
    crf: quality, 0 (lossless) to 51. keyframe_interval: a keyframe at least every so many frames (x264's default: 250).
    Raises UserError for odd sizes, which yuv420p can't store, and for frame rates outside (0, 1000].
    """
    _check(frames)
    _check_rate(fps)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(
            f"{path}: H.264 needs an even height and width, got {height}x{width}; crop or resize the frames"
        )
    with atomic_file(path) as temporary:
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        with av.open(str(temporary), "w", format="mp4", options=options) as container:
            if metadata:
                container.metadata["comment"] = json.dumps(dict(metadata), sort_keys=True)
            _encode(container, frames, fps, crf, keyframe_interval)


def _encode(
    container: av.container.OutputContainer, frames: Frames, fps: float, crf: int, keyframe_interval: int | None
) -> None:
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(_RATE_DENOMINATOR))
    stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
    # x264's output depends on the number of threads; and with the newest vector instructions a few bytes that no
    # decoder reads differ from run to run, so the set is fixed to one that every x86-64 machine of a decade has.
    stream.codec_context.thread_count = 1
    stream.options = {"crf": str(crf), "preset": "medium", "threads": "1", "flags": "+bitexact"}
    if platform.machine() in ("x86_64", "AMD64"):
        stream.options = {**stream.options, "x264-params": "asm=SSE4.2"}
    if keyframe_interval is not None:
        stream.options = {**stream.options, "g": str(keyframe_interval)}
    for frame in frames:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
    container.mux(stream.encode(None))


def read_frames(path: Path, *, max_frames: int | None = None) -> tuple[Frames, float]:
    """Decode a clip (video file, GIF, or one image) to ((T, H, W, 3) uint8, frames per second), as players show it.

    Reads at most `max_frames` frames. Raises UserError when the file can't be decoded or holds no frame.
    """
    if path.suffix.lower() in STILL_SUFFIXES and path.is_file():
        return shown_image(path.read_bytes(), str(path))[None], _STILL_RATE
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 1)
            frames = [frame for _, frame in itertools.islice(shown_rgb(container), max_frames)]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise UserError(f"{path}: not a readable video ({error or type(error).__name__})") from None
    if not frames:
        raise UserError(f"{path}: the file holds no video frame")
    return np.stack(frames), rate


def read_comment(path: Path) -> dict[str, str]:
    """Return what `write_mp4` stored as metadata in `path`; empty when there is none."""
    with av.open(str(path)) as container:
        comment = container.metadata.get("comment")
    return dict(json.loads(comment)) if comment else {}


def write_gif(path: Path, frames: Frames, fps: float, metadata: Mapping[str, str] | None = None) -> None:
    """Write a looping GIF with one palette per frame; `metadata` becomes the comment block (JSON)."""
    _check(frames)
    _check_rate(fps)
    images = [Image.fromarray(frame) for frame in frames]
    with atomic_file(path) as temporary:
        images[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=max(20, round(1000 / fps)),  # players slow down anything faster than 50 frames per second
            loop=0,
            comment=json.dumps(dict(metadata), sort_keys=True).encode() if metadata else b"",
        )


def write_png(path: Path, image: Frames, metadata: Mapping[str, str] | None = None) -> None:
    """Write one (H, W, 3) uint8 RGB image; each metadata key becomes a PNG text chunk."""
    information = PngImagePlugin.PngInfo()
    for key, value in sorted((metadata or {}).items()):
        information.add_text(key, value)
    with atomic_file(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=information)


def write_png_sequence(folder: Path, frames: Frames, metadata: Mapping[str, str] | None = None) -> list[Path]:
    """Write `folder/0000.png`, `0001.png`, …; returns the paths in order."""
    _check(frames)
    paths = [folder / f"{index:04d}.png" for index in range(len(frames))]
    for path, frame in zip(paths, frames, strict=True):
        write_png(path, frame, metadata)
    return paths


def filmstrip(frames: Frames, n: int = 8) -> Frames:
    """Put `n` frames, spread evenly from the first to the last, side by side: (H, n * W, 3) uint8; T when T < n."""
    _check(frames)
    chosen = np.linspace(0, len(frames) - 1, min(n, len(frames))).round().astype(int)
    return np.concatenate([frames[index] for index in chosen], axis=1)


def to_uint8(video: NDArray[np.floating]) -> Frames:
    """Convert frames (T, 3, H, W) in [0, 1] to (T, H, W, 3) uint8, rounded to the nearest level."""
    return (np.clip(video, 0, 1).transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
