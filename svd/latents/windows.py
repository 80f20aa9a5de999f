"""From a clip to the frames of a training sample: a window at a frame rate, decoded and scaled (§2, D.2)."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from svd.latents.loader import generator
from svd.media.shown import shown_rgb

Frames = NDArray[np.uint8]


class UnreadableClip(Exception):
    """A clip that can't be decoded as the catalogue describes it; the message says why."""


@dataclass(frozen=True, order=True)
class Window:
    """`frames` frames of a clip from `start` on, every `stride`-th; `fps` is the frame rate that results."""

    start: int
    stride: int
    frames: int
    fps: float

    @property
    def indices(self) -> range:
        """The numbers of its frames in the clip."""
        return range(self.start, self.start + self.frames * self.stride, self.stride)


def choose_windows(
    clip_id: str, clip_frames: int, clip_fps: float, frames: int, fps_range: tuple[float, float], windows: int
) -> list[Window]:
    """Choose up to `windows` different windows of `frames` frames, spread over a clip, from the clip's id alone.

    Each window draws a frame rate from `fps_range` and takes the stride that comes nearest, or in a short clip the
    largest that fits. For example 14 frames at 7 fps of a clip with 96 frames at 24 fps: stride 3, at 8 fps. Returns
    none when the clip has too few frames at the highest rate of the range, or is itself slower than the lowest.
    """
    low, high = fps_range
    smallest = max(1, math.ceil(clip_fps / high - 1e-6))
    largest = (clip_frames - 1) // (frames - 1) if frames > 1 else max(smallest, math.ceil(clip_fps))
    if clip_fps < low * (1 - 1e-6) or largest < smallest or clip_frames < frames:
        return []
    found = []
    for number in range(windows):
        fps, place = torch.rand(2, generator=generator(number, frames, f"{clip_id}/window")).tolist()
        wanted = round(clip_fps / (low + (high - low) * fps))
        stride = min(max(wanted, smallest), largest)
        free = clip_frames - ((frames - 1) * stride + 1)
        start = min(free, int((free + 1) * (number + place) / windows))
        found.append(Window(start, stride, frames, clip_fps / stride))
    return sorted(set(found))


def decode_frames(video: bytes, wanted: set[int]) -> dict[int, Frames]:
    """Decode the `wanted` frames of an mp4, by number, to (H, W, 3) uint8 as players show them.

    Raises UnreadableClip.
    """
    found: dict[int, Frames] = {}
    try:
        with av.open(io.BytesIO(video), "r") as container:
            found.update(shown_rgb(container, wanted))
    except (av.error.FFmpegError, IndexError) as error:
        raise UnreadableClip(f"can't be decoded: {error}") from error
    if missing := wanted - found.keys():
        raise UnreadableClip(f"{len(missing)} of {len(wanted)} frames are missing; it ends before frame {min(missing)}")
    return found


def cover_frames(frames: list[Frames], height: int, width: int) -> Tensor:
    """Scale (H, W, 3) uint8 frames to cover height x width, antialiased, and crop the centre: (T, 3, H, W) uint8."""
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    size = max(height, round(pixels.shape[2] * scale)), max(width, round(pixels.shape[3] * scale))
    if size != tuple(pixels.shape[2:]):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[:, :, top : top + height, left : left + width].round().clamp(0, 255).to(torch.uint8).contiguous()
