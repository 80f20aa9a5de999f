"""Clips that an evaluation makes, one file each: a killed run goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.multiview.protocol import save_array
from svd.media.video import Frames, to_uint8

AT_ONCE = 8  # clips generated together


def kept_clips(folder: Path, count: int, make: Callable[[Sequence[int]], Tensor]) -> list[Frames]:
    """Return clips 0 … count - 1, (T, H, W, 3) uint8; `make` gives those of some numbers, (B, T, 3, H, W) in [0, 1].

    Finished clips lie in `folder`, which belongs to one protocol.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:05d}.npy" for number in range(count)]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    for first in tqdm(range(0, len(missing), AT_ONCE), folder.name, unit="batch", delay=2):
        numbers = missing[first : first + AT_ONCE]
        for number, clip in zip(numbers, as_frames(make(numbers)), strict=True):
            save_array(files[number], clip)
    return [np.asarray(np.load(file), np.uint8) for file in files]


def as_frames(clips: Tensor) -> list[Frames]:
    """Round clips (B, T, 3, H, W) in [0, 1] to frames (T, H, W, 3) uint8."""
    return [to_uint8(clip) for clip in clips.float().cpu().numpy()]


def as_clips(frames: Sequence[Frames]) -> Tensor:
    """Stack frames (T, H, W, 3) uint8 to clips (B, T, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack(frames)).permute(0, 1, 4, 2, 3).float() / 255
