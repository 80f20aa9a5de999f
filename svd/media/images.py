"""What generation reads and writes: prompts, pictures, clips."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from svd.core.errors import UserError
from svd.media import watermark
from svd.media.resize import cover
from svd.media.video import read_frames, to_uint8, write_gif, write_mp4, write_png, write_png_sequence

FORMATS = (".mp4", ".gif", ".png", "")


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line; blank lines and lines that begin with # are skipped.

    Raises UserError for a file that is missing, no UTF-8 text, or empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a text file with one prompt a line") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable text file ({error})") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return prompts


def read_picture(path: Path) -> Tensor:
    """A picture as viewers show it, (3, H, W) float32 in [0, 1]; transparency becomes white, as in the multi-view
    training set.

    Raises UserError when the file is missing or no picture.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a picture (PNG, JPEG, …)") from None
    except OSError as error:
        raise UserError(f"{path}: not a readable picture ({type(error).__name__})") from None
    return decode_picture(content, str(path))


def decode_picture(content: bytes, name: str) -> Tensor:
    """A picture file's content as `read_picture` gives it; errors call it `name`. Raises UserError when it is none."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            rgba = ImageOps.exif_transpose(picture).convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{name}: not a readable picture ({type(error).__name__})") from None
    white = Image.new("RGBA", rgba.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def read_pictures(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Pictures scaled to cover (height, width) and cropped in the middle: (B, 3, H, W) in [0, 1]."""
    return torch.cat([cover(read_picture(path)[None], *size) for path in paths])


def read_clip(path: Path) -> tuple[Tensor, float]:
    """A clip as (T, 3, H, W) float32 in [0, 1] and its frames per second; a folder is read as its PNG files in order.

    A folder has no rate and gets 1. Raises UserError when there is nothing to read.
    """
    if path.is_dir():
        files = sorted(path.glob("*.png"))
        if not files:
            raise UserError(f"{path}: the folder holds no .png")
        return torch.stack([read_picture(file) for file in files]), 1.0
    frames, fps = read_frames(path)
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255, fps


def check_format(path: Path) -> str:
    """The suffix in lower case; raises UserError unless `save_clip` can write it."""
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
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UserError(
            f"{path}: unknown format '{path.suffix}'; use .mp4, .gif, .png, or a folder name without suffix"
        )
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
