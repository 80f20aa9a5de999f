"""Scoring a measured unit: captions, CLIP similarity and aesthetics, then its clips packed into a shard.

The networks run in the parent process, on the GPU when there is one, batched over all clips of a unit. The scored unit
appears by one rename, as the measured one does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl
import torch
from safetensors.torch import save_file

from svd.curation import catalog, embeddings
from svd.curation.captions import Captioner, CaptionRequest, describe_all
from svd.curation.measure import JPEG_QUALITY, THUMBNAIL_WIDTH, read_frames
from svd.data.shards import Member, ShardWriter

# Kept in the shard's JSON: what is true of the clip whatever the filters say.
SAMPLE_COLUMNS = (
    "clip_id",
    "source_id",
    "source_uri",
    "split",
    "start_seconds",
    "end_seconds",
    "duration",
    "frames",
    "fps",
    "width",
    "height",
    "motion_score",
    "camera",
    "text_area",
    "licence",
    "metadata",
)


@dataclass(frozen=True)
class Scorer:
    """The networks of scoring. used: names of the captions to keep, in order; head: the aesthetics head, if any."""

    encoders: embeddings.ClipEncoders
    captioners: Sequence[Captioner]
    used: Sequence[str]
    head: embeddings.AestheticsHead | None = None
    nsfw: embeddings.NsfwScorer | None = None
    device: str = "cpu"
    batch: int = 64

    def score_unit(self, measured: Path, folder: Path, shard_bytes: int) -> Path:
        """Score and pack the unit in `measured`; returns `folder`/<unit name>: scores.parquet, embeddings, shards."""
        target = folder / measured.name
        if target.exists():
            return target
        temporary = folder / f".{measured.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        rows = pl.read_parquet(measured / "clips.parquet").to_dicts()
        frames = [read_frames(measured, row["clip_id"]) for row in rows]
        scores = self._scores(rows, frames, measured, temporary)
        with ShardWriter(temporary, shard_bytes, measured.name) as writer:
            for row, score, frame in zip(rows, scores, frames, strict=True):
                files: dict[str, bytes | Path] = {
                    "mp4": measured / "clips" / f"{row['clip_id']}.mp4",
                    "jpg": thumbnail(frame[1]),
                    "json": _sample_json(row, score),
                }
                score.update(_places(writer.add(row["clip_id"], files)))
        catalog.write_rows(temporary / "scores.parquet", scores, catalog.SCORED_SCHEMA)
        temporary.rename(target)
        return target

    def _scores(
        self, rows: Sequence[Mapping[str, Any]], frames: Sequence[np.ndarray], measured: Path, folder: Path
    ) -> list[dict[str, Any]]:
        if not rows:
            save_file({}, folder / "embeddings.safetensors")
            return []
        images = embeddings.image_embeddings(frames, self.encoders, self.batch, self.device)
        names = [row["clip_id"] for row in rows]
        halves = {name: image.half().contiguous() for name, image in zip(names, images, strict=True)}
        save_file(halves, folder / "embeddings.safetensors")
        captions = self._captions(names, frames, measured)
        every = [text for own in captions for text in own.values()]
        texts = embeddings.text_embeddings(every, self.encoders, self.batch)
        aesthetics = embeddings.aesthetics(images, self.head).tolist() if self.head else [None] * len(rows)
        nsfw = self.nsfw.scores(images).tolist() if self.nsfw else [None] * len(rows)
        scores = []
        for at, name in enumerate(names):
            by_captioner = embeddings.similarities(images[at], captions[at], texts)
            scores.append(
                {
                    "clip_id": name,
                    "captions": [{"captioner": n, "text": t} for n, t in captions[at].items()],
                    "similarities": [{"captioner": n, "value": v} for n, v in by_captioner.items()],
                    "similarity": embeddings.similarity_score(by_captioner),
                    "aesthetics": aesthetics[at],
                    "nsfw": nsfw[at],
                }
            )
        return scores

    def _captions(self, names: Sequence[str], frames: Sequence[np.ndarray], measured: Path) -> list[dict[str, str]]:
        own: dict[str, dict[str, str]] = json.loads((measured / "captions.json").read_text())
        requests = [
            CaptionRequest(name, frame, measured / "clips" / f"{name}.mp4", {})
            for name, frame in zip(names, frames, strict=True)
        ]
        found = describe_all(requests, [own[name] for name in names], self.captioners)
        return [{name: captions[name] for name in self.used if name in captions} for captions in found]


def thumbnail(frame: np.ndarray) -> bytes:
    """A JPEG at most THUMBNAIL_WIDTH wide of an (H, W, 3) uint8 RGB frame."""
    height, width = frame.shape[:2]
    scale = min(1.0, THUMBNAIL_WIDTH / width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def _places(members: Mapping[str, Member]) -> dict[str, Any]:
    video, picture = members["mp4"], members["jpg"]
    return {
        "shard": video.shard,
        "offset": video.offset,
        "size": video.size,
        "thumbnail_offset": picture.offset,
        "thumbnail_size": picture.size,
    }


def _sample_json(row: Mapping[str, Any], score: Mapping[str, Any]) -> bytes:
    facts = {name: row[name] for name in SAMPLE_COLUMNS}
    facts["captions"] = {c["captioner"]: c["text"] for c in score["captions"]}
    facts |= {name: score[name] for name in ("similarity", "aesthetics", "nsfw")}
    return (json.dumps(facts, sort_keys=True) + "\n").encode()


def pick_device() -> str:
    """The device that networks of curation run on."""
    return "cuda" if torch.cuda.is_available() else "cpu"
