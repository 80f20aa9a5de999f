"""Scoring a measured unit: captions, CLIP similarity and aesthetics, then its clips packed into a shard.

The networks run on the GPU when there is one, batched over all clips of a unit. The scored unit appears by one rename,
as the measured one does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import save_file

from svd.catalogue import schema
from svd.catalogue import tables as catalog
from svd.catalogue.shards import Member, ShardWriter
from svd.core.files import atomic_folder
from svd.curation.captions.base import Captioner, CaptionRequest, describe_all
from svd.curation.clips.stills import read_frame, read_frames, thumbnail
from svd.curation.scoring import embeddings

GROUP = 32  # clips that are scored together
DESCRIBED = 16  # clips whose frames are in memory together, for captioners; otherwise one frame is
BATCH = {"cpu": 8, "cuda": 64}  # frames that go through the image encoder together
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

    @property
    def batch(self) -> int:
        """Frames or texts that go through a network together."""
        return BATCH[self.device]

    def score_unit(self, measured: Path, folder: Path, shard_bytes: int) -> Path:
        """Score and pack the unit in `measured`; returns `folder`/<unit name>: scores.parquet, embeddings, shards.

        The clips and frames of the measured unit are removed afterwards: the shard holds them.
        """
        target = folder / measured.name
        if not target.exists():
            with atomic_folder(target) as temporary:
                self._score(measured, temporary, shard_bytes)
        for name in ("clips", "frames"):
            shutil.rmtree(measured / name, ignore_errors=True)
        return target

    def _score(self, measured: Path, folder: Path, shard_bytes: int) -> None:
        clips = pl.read_parquet(measured / "clips.parquet")
        own: dict[str, dict[str, str]] = json.loads((measured / "captions.json").read_text())
        scores: list[dict[str, Any]] = []
        vectors: dict[str, torch.Tensor] = {}
        with ShardWriter(folder, shard_bytes, measured.name) as writer:
            # A group bounds memory: a unit may hold a thousand clips.
            for start in range(0, len(clips), GROUP):
                group = clips[start : start + GROUP].to_dicts()
                names = [row["clip_id"] for row in group]
                thumbnails: dict[str, bytes] = {}
                seen = (_look(measured, name, thumbnails) for name in names)
                images = embeddings.image_embeddings(seen, self.encoders, self.batch, self.device)
                vectors |= {name: v.half().contiguous() for name, v in zip(names, images, strict=True)}
                captions = self._captions(measured, names, own)
                for row, score in zip(group, self._scores(names, captions, images), strict=True):
                    name = row["clip_id"]
                    files: dict[str, bytes | Path] = {
                        "mp4": _video(measured, name),
                        "jpg": thumbnails[name],
                        "json": _sample_json(row, score),
                    }
                    scores.append(score | _places(writer.add(name, files)))
        save_file(vectors, folder / "embeddings.safetensors")
        catalog.write_rows(folder / "scores.parquet", scores, schema.SCORED_SCHEMA)

    def _scores(
        self, names: Sequence[str], captions: Sequence[Mapping[str, str]], images: torch.Tensor
    ) -> list[dict[str, Any]]:
        """Scores of a group of clips; captions by captioner, images (N, 3, E) unit-length."""
        every = [text for own in captions for text in own.values()]
        texts = embeddings.text_embeddings(every, self.encoders, self.batch)
        nothing = [None] * len(names)
        aesthetics = embeddings.aesthetics(images, self.head).tolist() if self.head else nothing
        nsfw = self.nsfw.scores(images).tolist() if self.nsfw else nothing
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

    def _captions(
        self, measured: Path, names: Sequence[str], own: Mapping[str, Mapping[str, str]]
    ) -> list[dict[str, str]]:
        """The captions in use of each clip by captioner. own: those known, by clip."""
        found: list[dict[str, str]] = []
        for start in range(0, len(names), DESCRIBED):
            some = names[start : start + DESCRIBED]
            requests = [
                CaptionRequest(name, read_frames(measured, name), _video(measured, name), own[name])
                for name in some
                if self.captioners  # frames are large
            ]
            found += describe_all(requests, [own[name] for name in some], self.captioners)
        return [{name: captions[name] for name in self.used if name in captions} for captions in found]


def _video(measured: Path, name: str) -> Path:
    return measured / "clips" / f"{name}.mp4"


def _look(measured: Path, name: str, thumbnails: dict[str, bytes]) -> Iterator[np.ndarray]:
    """First, middle and last frame of a clip, none of them kept; a thumbnail of the middle one is."""
    for position in range(3):
        frame = read_frame(measured, name, position)
        if position == 1:
            thumbnails[name] = thumbnail(frame)
        yield frame


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
