"""Choosing frames of a clip at a frame rate, decoding them and bringing them to the training size (§2, D.2)."""

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
from svd.media.orientation import upright_rgb

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
        """Numbers of the frames in the clip."""
        return range(self.start, self.start + self.frames * self.stride, self.stride)


def choose_windows(
    clip_id: str, clip_frames: int, clip_fps: float, frames: int, fps_range: tuple[float, float], windows: int
) -> list[Window]:
    """Up to `windows` different windows of `frames` frames, spread over a clip, as a function of the clip's id alone.

    Each window draws a frame rate from `fps_range` and takes the stride that comes nearest; a clip too short for it
    takes the largest stride that fits. Empty when the clip holds too few frames at the highest rate of the range, or
    is itself slower than the lowest.
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


def decode(video: bytes, wanted: set[int]) -> dict[int, Frames]:
    """The `wanted` frames, by number, of an mp4 as (H, W, 3) uint8, as players show it; raises UnreadableClip."""
    found: dict[int, Frames] = {}
    try:
        with av.open(io.BytesIO(video), "r") as container:
            found.update(upright_rgb(container.decode(container.streams.video[0]), wanted))
    except (av.error.FFmpegError, IndexError) as error:
        raise UnreadableClip(f"can't be decoded: {error}") from error
    if missing := wanted - found.keys():
        raise UnreadableClip(f"{len(missing)} of {len(wanted)} frames are missing; it ends before frame {min(missing)}")
    return found


def fit(pictures: list[Frames], height: int, width: int) -> Tensor:
    """Scale (H, W, 3) uint8 pictures to cover `height` x `width`, antialiased, and crop the centre: (T, 3, height,
    width) uint8.
    """
    frames = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    scale = max(height / frames.shape[2], width / frames.shape[3])
    size = max(height, round(frames.shape[2] * scale)), max(width, round(frames.shape[3] * scale))
    if size != tuple(frames.shape[2:]):
        frames = F.interpolate(frames, size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width].round().clamp(0, 255).to(torch.uint8).contiguous()
