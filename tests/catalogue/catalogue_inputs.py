"""A small curation output made without curating: real clips in real shards, scores chosen by the test."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import polars as pl
from curation_inputs import write_video

from svd.catalogue import filters, schema, tables
from svd.catalogue.shards import ShardWriter
from svd.config import FiltersConfig


def write_catalogue(folder: Path, count: int = 12, config: dict | None = None, codec: str = "h264") -> Path:
    """`count` clips with motion 0.0, 0.1, … and text area falling from 0.2; every fourth lacks an aesthetic score."""
    (folder / "catalogue").mkdir(parents=True)
    write_video(folder / "clip.mp4", frames=12)
    video = (folder / "clip.mp4").read_bytes()
    rows = []
    with ShardWriter(folder / "shards", 1 << 20, "clips-000000") as writer:
        for i in range(count):
            picture = np.full((54, 96, 3), (20 * i % 255, 80, 160), np.uint8)
            places = writer.add(f"clip{i:02d}", {"mp4": video, "jpg": cv2.imencode(".jpg", picture)[1].tobytes()})
            rows.append(
                {
                    "clip_id": f"clip{i:02d}",
                    "source_uri": f"train/video{i // 3}.mp4",
                    "split": "train",
                    "unit": 0,
                    "start_frame": 12 * i,
                    "end_frame": 12 * i + 12,
                    "start_seconds": 0.5 * i,
                    "end_seconds": 0.5 * i + 0.5,
                    "duration": 0.5,
                    "frames": 12,
                    "fps": 24.0,
                    "width": 96,
                    "height": 64,
                    "codec": codec,
                    "method": "copy",
                    "motion_score": i / 10,
                    "camera": "static" if i < 3 else "pan-left",
                    "text_area": 0.2 * (count - 1 - i) / max(1, count - 1),
                    "aesthetics": None if i % 4 == 0 else 4 + i / 10,
                    "captions": [{"captioner": "sidecar", "text": f"thing number {i}"}],
                    "shard": places["mp4"].shard,
                    "offset": places["mp4"].offset,
                    "size": places["mp4"].size,
                    "thumbnail_offset": places["jpg"].offset,
                    "thumbnail_size": places["jpg"].size,
                }
            )
    frame = pl.DataFrame(rows, infer_schema_length=None)
    tables.write_table(folder / "catalogue" / "clips.parquet", tables.with_schema(frame, schema.SCORES_SCHEMA))
    filters.write_verdicts(folder, FiltersConfig.model_validate(config or {}))
    sources = [
        {"source_uri": uri, "split": "train", "verdict": "ok", "reason": ""}
        for uri in frame["source_uri"].unique(maintain_order=True)
    ]
    for name, reason in (("a", "the file is empty"), ("b", "the file is empty"), ("c", "no video stream")):
        sources.append({"source_uri": f"train/{name}.mp4", "split": "train", "verdict": "failed", "reason": reason})
    tables.write_table_rows(folder / "catalogue" / "sources.parquet", sources, schema.SOURCES_SCHEMA)
    return folder
