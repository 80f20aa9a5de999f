"""Still images as files: one function from the stored bytes to the image that viewers show."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from svd.core.errors import UserError
from svd.media.resize import cover

STILL_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def shown_image(content: bytes, name: str) -> NDArray[np.uint8]:
    """Decode an image file's content to (H, W, 3) uint8 RGB, as viewers show it; all readers of images go through it.

    EXIF's orientation is applied. Transparency becomes white, as in the multi-view training set. Palettes, grey and
    CMYK become RGB, 16 bits become 8. `name` is what errors call it. Raises UserError when it is no image.
    """
    try:
        with Image.open(io.BytesIO(content)) as opened:
            rgba = ImageOps.exif_transpose(_eight_bits(opened)).convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable picture ({type(error).__name__})") from None
    white = Image.new("RGBA", rgba.size, "white")
    return np.array(Image.alpha_composite(white, rgba).convert("RGB"))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow would cut 16-bit greys off at 255 instead of scaling them; their orientation is kept."""
    if not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image, np.float32) / 257
    scaled = Image.fromarray(levels.round().astype(np.uint8))
    scaled.info["exif"] = image.getexif().tobytes()
    return scaled


def decode_image(content: bytes, name: str) -> Tensor:
    """Decode an image file's content as `shown_image` does, to (3, H, W) float32 in [0, 1]. Raises UserError."""
    return torch.from_numpy(shown_image(content, name)).permute(2, 0, 1).float() / 255


def read_image(path: Path) -> Tensor:
    """Read an image as viewers show it, (3, H, W) float32 in [0, 1]; transparency becomes white.

    Raises UserError when the file is missing or no image.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a picture (PNG, JPEG, …)") from None
    except OSError as error:
        raise UserError(f"{path}: not a readable picture ({type(error).__name__})") from None
    return decode_image(content, str(path))


def read_images(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Read images, scale them to cover `size` (height, width) and crop the middle: (B, 3, H, W) in [0, 1]."""
    return torch.cat([cover(read_image(path)[None], *size) for path in paths])
