"""A grid of film strips for people to look at: generated clips beside real ones, with class labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from svd.media.video import Frames

_GAP = 4
_LABEL = 15


def strip(clip: Frames, frames: int) -> Frames:
    """Return `frames` evenly spaced frames of a clip (T, H, W, 3) side by side, (H, frames·W, 3)."""
    chosen = np.linspace(0, len(clip) - 1, min(frames, len(clip))).round().astype(int)
    return np.concatenate(list(clip[chosen]), axis=1)


def fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return the text, cut with an ellipsis where it is wider than `width` pixels, so that labels don't overlap."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def comparison_grid(pairs: Sequence[tuple[str, Frames, Frames]], frames: int = 4) -> Frames:
    """Draw one row per (label, generated clip, real clip): two film strips side by side under the label.

    Returns (H, W, 3) uint8. Raises ValueError for an empty list.
    """
    if not pairs:
        raise ValueError("no clips to show")
    rows = [(label, strip(generated, frames), strip(real, frames)) for label, generated, real in pairs]
    height, width = rows[0][1].shape[:2]
    total = (2 * width + 3 * _GAP, len(rows) * (height + _LABEL + _GAP) + _GAP)
    sheet = Image.new("RGB", total, (250, 250, 250))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (label, generated, real) in enumerate(rows):
        top = _GAP + number * (height + _LABEL + _GAP)
        for column, (title, image) in enumerate((("generated", generated), ("real", real))):
            left = _GAP + column * (width + _GAP)
            draw.text((left, top), fitted(f"{title} · {label}", width, font), fill=(60, 60, 60), font=font)
            sheet.paste(Image.fromarray(image), (left, top + _LABEL))
    return np.asarray(sheet)
