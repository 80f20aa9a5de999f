"""Figures of the multi-view benchmark: contact sheet, turntable, PSNR against azimuth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from evaluation.multiview.protocol import Views
from evaluation.multiview.scores import Scores

_MARGIN, _LABEL = 64, 14


def views_sheet(truth: Sequence[Views], views: Sequence[Views], azimuths: NDArray[np.float64]) -> Views:
    """Draw three rows per object (truth, generated, absolute difference), one column per view; (H, W, 3) uint8."""
    size, count = truth[0].shape[1], len(azimuths)
    sheet = Image.new("RGB", (_MARGIN + count * size, _LABEL + len(truth) * 3 * size + 6 * len(truth)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for column, azimuth in enumerate(azimuths):
        text = f"{azimuth:.0f}°" + (" input" if column == count - 1 else "")
        draw.text((_MARGIN + column * size + 3, 1), text, fill=(90, 90, 90), font=font)
    for number, (true, made) in enumerate(zip(truth, views, strict=True)):
        top = _LABEL + number * (3 * size + 6)
        difference = np.abs(true.astype(np.int16) - made).astype(np.uint8)
        for row, (label, images) in enumerate((("truth", true), ("generated", made), ("difference", difference))):
            draw.text((3, top + row * size + size // 2 - 6), label, fill=(90, 90, 90), font=font)
            sheet.paste(Image.fromarray(np.concatenate(list(images), 1)), (_MARGIN, top + row * size))
    return np.asarray(sheet)


def turntable(truth: Sequence[Views], views: Sequence[Views], least: int = 128) -> NDArray[np.uint8]:
    """Return turning objects, truth above generated, (V, H, W, 3); small views are enlarged by whole factors."""
    top, bottom = (np.concatenate(list(part), axis=2) for part in (truth, views))
    frames = np.concatenate([top, bottom], axis=1)
    factor = max(1, least // truth[0].shape[1])
    return np.asarray(frames.repeat(factor, axis=1).repeat(factor, axis=2), np.uint8)


def azimuth_chart(path: Path, scores: Sequence[Scores], azimuths: NDArray[np.float64]) -> None:
    """Draw PSNR against azimuth as a PNG, one line per subject; trained models are worst at the object's back."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), dpi=110, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    for one in scores:
        emphasis = one.subject == "generated"
        width, style = (2.2, "-") if emphasis else (1.2, "--")
        axes.plot(azimuths[:-1], one.by_view("psnr")[:-1], style, linewidth=width, label=one.subject, marker=".")
    axes.set_xlabel("azimuth from the input view, degrees")
    axes.set_ylabel("PSNR, dB")
    axes.set_xticks(range(0, 361, 45))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, metadata={"Software": None})
