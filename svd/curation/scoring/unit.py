"""Scoring a measured unit: captions, CLIP similarity and the other axes scored by networks; then packing its clips.

The networks run on the GPU when there is one, batched over the clips of a unit. The scored unit appears by one rename,
as the measured unit does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import save_file

from svd.catalogue import schema, tables
from svd.catalogue.axes import axes_computed
from svd.catalogue.shards import Member, ShardWriter
from svd.core.files import atomic_folder
from svd.curation.captions.base import Caption, Captioner, CaptionRequest, describe_all
from svd.curation.clips.stills import encode_thumbnail, read_still, read_stills
from svd.curation.scoring import embeddings

GROUP = 32  # clips that are scored together
DESCRIBED = 16  # clips whose frames are in memory together for captioners; without captioners it is one frame
BATCH = {"cpu": 8, "cuda": 64}  # frames or texts per forward pass of an encoder, by device
# Columns of the JSON in the shard: facts of the clip that no filter changes.
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
    "variable_rate",
    "width",
    "height",
    "pixel_format",
    "transfer",
    "sample_aspect",
    "rotation",
    "interlaced",
    "camera",
    "licence",
    "metadata",
    *(axis.column for axis in axes_computed("measured")),
)
# Scores of N clips from the unit-length embeddings (N, 3, E) of their three frames: (N,).
Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ClipScorer:
    """Scores measured units with networks.

    used: names of the captions to keep, in order. heads: by axis name, what scores an axis from image embeddings; an
    axis without a head is not measured.
    """

    encoders: embeddings.ClipEncoders
    captioners: Sequence[Captioner]
    used: Sequence[str]
    heads: Mapping[str, Head] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def batch(self) -> int:
        """Return how many frames or texts go through an encoder together."""
        return BATCH[self.device]

    def score_unit(self, measured: Path, folder: Path, shard_bytes: int) -> Path:
        """Score and pack the unit in `measured`; return `folder`/<unit name> with scores, embeddings and shards.

        The clips and frames of the measured unit are removed afterwards: the shards hold them.
        """
        target = folder / measured.name
        if not target.exists():
            with atomic_folder(target) as temporary:
                self._score(measured, temporary, shard_bytes)
        for name in ("clips", "frames"):
            shutil.rmtree(measured / name, ignore_errors=True)
        return target

    def _score(self, measured: Path, folder: Path, shard_bytes: int) -> None:
        """Write scores.parquet, embeddings.safetensors and the shards of a unit into `folder`."""
        clips = pl.read_parquet(measured / "clips.parquet")
        own: dict[str, list[Caption]] = json.loads((measured / "captions.json").read_text())
        scores: list[dict[str, Any]] = []
        vectors: dict[str, torch.Tensor] = {}
        with ShardWriter(folder, shard_bytes, measured.name) as writer:
            # In groups, which bound memory: a unit may hold a thousand clips.
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
        tables.write_table_rows(folder / "scores.parquet", scores, schema.SCORED_SCHEMA)

    def _scores(
        self, names: Sequence[str], captions: Sequence[Sequence[Caption]], images: torch.Tensor
    ) -> list[dict[str, Any]]:
        """Return the scores of N clips; captions: of each, images: unit-length embeddings (N, 3, E)."""
        every = [text for known in captions for _, text in known]
        texts = embeddings.text_embeddings(every, self.encoders, self.batch)
        by_axis = {axis: head(images).tolist() for axis, head in self.heads.items()}
        scores = []
        for at, name in enumerate(names):
            by_captioner = embeddings.similarities(images[at], captions[at], texts)
            own = {axis: values[at] for axis, values in by_axis.items()}
            own["similarity"] = embeddings.similarity_score(by_captioner)
            scores.append(
                {
                    "clip_id": name,
                    "captions": [{"captioner": n, "text": t} for n, t in captions[at]],
                    "similarities": [{"captioner": n, "value": v} for n, v in by_captioner],
                    **{axis.column: own.get(axis.name) for axis in axes_computed("scored")},
                }
            )
        return scores

    def _captions(
        self, measured: Path, names: Sequence[str], own: Mapping[str, Sequence[Caption]]
    ) -> list[list[Caption]]:
        """Return the captions of each clip, in the order of `used`; own: those known without a network, by clip."""
        found: list[list[Caption]] = []
        for start in range(0, len(names), DESCRIBED):
            some = names[start : start + DESCRIBED]
            requests = [
                CaptionRequest(name, read_stills(measured, name), _video(measured, name), {})
                for name in some
                if self.captioners  # without captioners no frame is read: frames are large
            ]
            found += describe_all(requests, [own[name] for name in some], self.captioners)
        return [[(n, text) for used in self.used for n, text in captions if n == used] for captions in found]


def _video(measured: Path, name: str) -> Path:
    return measured / "clips" / f"{name}.mp4"


def _look(measured: Path, name: str, thumbnails: dict[str, bytes]) -> Iterator[np.ndarray]:
    """Yield the three frames of a clip, of which none is kept; note a thumbnail of the middle one in `thumbnails`."""
    for position in range(3):
        frame = read_still(measured, name, position)
        if position == 1:
            thumbnails[name] = encode_thumbnail(frame)
        yield frame


def _places(members: Mapping[str, Member]) -> dict[str, Any]:
    """Return the columns that say where the clip and its thumbnail lie."""
    video, thumbnail = members["mp4"], members["jpg"]
    return {
        "shard": video.shard,
        "offset": video.offset,
        "size": video.size,
        "thumbnail_offset": thumbnail.offset,
        "thumbnail_size": thumbnail.size,
    }


def _sample_json(row: Mapping[str, Any], score: Mapping[str, Any]) -> bytes:
    """Write the JSON of a clip in its shard."""
    facts = {name: row[name] for name in SAMPLE_COLUMNS}
    facts["captions"] = score["captions"]
    facts |= {name: score[name] for name in (axis.column for axis in axes_computed("scored"))}
    return (json.dumps(facts, sort_keys=True) + "\n").encode()
