"""Clips as files of any supported kind: mp4, GIF, PNG, or a folder of PNGs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from svd.core.errors import UserError
from svd.media import watermark
from svd.media.images import read_image
from svd.media.video import read_frames, to_uint8, write_gif, write_mp4, write_png, write_png_sequence

FORMATS = (".mp4", ".gif", ".png", "")


def load_video(path: Path) -> tuple[Tensor, float]:
    """Read a clip as (T, 3, H, W) float32 in [0, 1] and its frames per second; a folder as its PNG files in order.

    A folder has no rate and gets 1. Raises UserError when there is nothing to read.
    """
    if path.is_dir():
        files = sorted(path.glob("*.png"))
        if not files:
            raise UserError(f"{path}: the folder holds no .png")
        return torch.stack([read_image(file) for file in files]), 1.0
    frames, fps = read_frames(path)
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255, fps


def check_format(path: Path) -> str:
    """Return the suffix in lower case; raises UserError unless `save_clip` can write it."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UserError(
            f"{path}: unknown format '{path.suffix}'; use .mp4, .gif, .png, or a folder name without suffix"
        )
    return suffix


def save_clip(
    path: Path, clip: Tensor, fps: float, metadata: Mapping[str, str] | None = None, mark: bytes | None = None
) -> None:
    """Write a clip (T, 3, H, W) in [0, 1]: .mp4, .gif, .png (one frame), or a path without suffix for a folder of PNGs.

    metadata: stored in the file (mp4 comment, GIF comment, PNG text). mark: message of an invisible watermark.
    Raises UserError for other suffixes, for several frames in one .png, and for sizes that the format can't hold.
    """
    suffix = check_format(path)
    if suffix == ".png" and len(clip) > 1:
        raise UserError(f"{path}: a .png holds one frame, not {len(clip)}; give a folder name without suffix")
    frames = to_uint8(clip.detach().cpu().float().numpy())
    if mark is not None:
        frames = watermark.embed(frames, mark)
    if suffix == ".mp4":
        write_mp4(path, frames, fps, metadata)
    elif suffix == ".gif":
        write_gif(path, frames, fps, metadata)
    elif suffix == ".png":
        write_png(path, frames[0], metadata)
    else:
        write_png_sequence(path, frames, metadata)
