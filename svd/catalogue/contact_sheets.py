"""Contact sheets: thumbnails of what each filter keeps and drops, to be judged by eye."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import cv2  # not PIL: thumbnails are arrays here, as in all of curation
import numpy as np
import polars as pl

from svd.catalogue import tables
from svd.catalogue.axes import AXES
from svd.catalogue.shards import read_thumbnail

CELL_WIDTH, CELL_HEIGHT, LABEL_HEIGHT = 160, 96, 16
COLUMNS, ROWS = 6, 2


def write_contact_sheets(folder: Path, thresholds: Mapping[str, float]) -> list[Path]:
    """Write `contact/<axis>-kept.jpg` and `-dropped.jpg` per used axis, with clips spread over its scores.

    Returns the files that were written; a sheet without clips is left out.
    """
    target = folder / "contact"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    clips = tables.scan_clips(folder)
    written = []
    for axis in AXES:
        if axis.name not in thresholds:
            continue
        for name, passed in (("kept", True), ("dropped", False)):
            rows = pick(clips.filter(pl.col(f"pass_{axis.name}") == passed), axis.column, COLUMNS * ROWS)
            if len(rows):
                path = target / f"{axis.name}-{name}.jpg"
                cv2.imwrite(str(path), draw_sheet(folder, rows, axis.column)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
                written.append(path)
    return written


def pick(clips: pl.LazyFrame, column: str, count: int) -> pl.DataFrame:
    """Pick at most `count` clips, evenly spaced in the order of a score; equal scores are ordered by clip id."""
    wanted = ("clip_id", column, "shard", "thumbnail_offset", "thumbnail_size")
    order = clips.select(wanted).sort(column, "clip_id").collect(engine="streaming")
    places = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return order[places.tolist()] if len(order) else order


def draw_sheet(folder: Path, rows: pl.DataFrame, column: str) -> np.ndarray:
    """Draw a grid of thumbnails with their scores below, (H, W, 3) uint8 RGB."""
    count = -(-len(rows) // COLUMNS)
    height = CELL_HEIGHT + LABEL_HEIGHT
    canvas = np.full((count * height, COLUMNS * CELL_WIDTH, 3), 255, np.uint8)
    for index, row in enumerate(rows.iter_rows(named=True)):
        top, left = index // COLUMNS * height, index % COLUMNS * CELL_WIDTH
        thumbnail = decode_jpeg(read_thumbnail(folder, row))
        canvas[top : top + CELL_HEIGHT, left : left + CELL_WIDTH] = fit_into_cell(thumbnail)
        score = row[column]
        label = "-" if score is None else f"{score:.4f}"
        cv2.putText(
            canvas, label, (left + 4, top + height - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA
        )
    return canvas


def decode_jpeg(jpeg: bytes) -> np.ndarray:
    """Decode a JPEG to (H, W, 3) uint8 RGB; raises OSError when it isn't one."""
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise OSError("a thumbnail in the shard is no JPEG")
    return image[..., ::-1]


def fit_into_cell(image: np.ndarray) -> np.ndarray:
    """Scale an (H, W, 3) uint8 image into a cell of the sheet, centred on grey."""
    scale = min(CELL_WIDTH / image.shape[1], CELL_HEIGHT / image.shape[0])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    cell = np.full((CELL_HEIGHT, CELL_WIDTH, 3), 210, np.uint8)
    top, left = (CELL_HEIGHT - small.shape[0]) // 2, (CELL_WIDTH - small.shape[1]) // 2
    cell[top : top + small.shape[0], left : left + small.shape[1]] = small
    return cell
