"""Measured units of any number of clips, made without decoding a video: what scoring starts from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
from media_files import scenery

from svd.catalogue import schema, tables

PICTURES = 12  # different ones in a unit; clips share them


def write_unit(folder: Path, clips: int, height: int = 64, width: int = 96) -> Path:
    """A unit in `folder` as measure_unit leaves it, without what scoring doesn't read; returns its path."""
    unit = folder / "clips-000000"
    for name in ("pictures", "clips", "frames"):
        (unit / name).mkdir(parents=True)
    for number in range(PICTURES):
        cv2.imwrite(str(unit / "pictures" / f"{number}.jpg"), scenery(number, height, width))
    names = [tables.clip_id("source", 100 * number, 100 * number + 100) for number in range(clips)]
    for number, name in enumerate(names):
        (unit / "clips" / f"{name}.mp4").write_bytes(b"not looked into")
        for position in range(3):
            picture = unit / "pictures" / f"{(3 * number + position) % PICTURES}.jpg"
            os.link(picture, unit / "frames" / f"{name}-{position}.jpg")
    rows = [_row(number, name, height, width) for number, name in enumerate(names)]
    tables.write_table_rows(unit / "clips.parquet", rows, schema.MEASURED_SCHEMA)
    captions = {n: [("motion", "the camera pans left"), ("sidecar", f"scene {i % 7}")] for i, n in enumerate(names)}
    (unit / "captions.json").write_text(json.dumps(captions))
    return unit


def _row(number: int, name: str, height: int, width: int) -> dict[str, object]:
    columns = dict.fromkeys(schema.MEASURED_SCHEMA.names)
    times = {"start_seconds": 4.0 * number, "end_seconds": 4.0 * number + 4, "duration": 4.0, "frames": 100}
    picture = {"height": height, "width": width, "fps": 25.0}
    return columns | times | picture | {"clip_id": name, "source_id": "source", "split": "train", "unit": 0}
