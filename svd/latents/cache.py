"""The latent cache: safetensors shards of encoded clips and one Parquet index, as training reads them.

A shard holds, for N samples of one geometry: `moments` (N, T, 2C, h, w) bf16 posterior means and log-variances, so
that the posterior's noise stays fresh in every epoch; `image` (N, T, E) fp16 CLIP embeddings of every frame; `frame`
(N, 3, H, W) uint8, the clean conditioning frame; `text` (M, S, D) fp16, one entry per distinct caption. The index has
one row per sample; `index.py` reads it. A shard's name ends with a digest of its samples, and a sample's id is a digest
of (clip, frames, fps, size, weights): a cache made with another autoencoder or another frame rate has other names and
can't be mixed in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svd.catalogue.axes import SUBSET_AXES
from svd.config import Geometry, Phase
from svd.core.errors import UserError
from svd.core.files import atomic_file, write_json
from svd.core.finite import require_finite
from svd.core.retries import Unreachable
from svd.latents.index import Index, OpenedIndex, Rows
from svd.latents.streaming import StreamedShard, streamed_shards

T = TypeVar("T")
REQUESTS = 16  # samples of a batch that a process reads from a store at once

CAPTION = pl.Struct({"captioner": pl.String, "text": pl.String, "row": pl.Int64})
SCHEMA: dict[str, Any] = {
    "sample_id": pl.String,
    "clip_id": pl.String,
    "geometry": pl.String,
    "split": pl.String,
    "fps": pl.Float64,
    "motion_bucket": pl.Int64,
    **{axis.column: pl.Float64 for axis in SUBSET_AXES},
    "camera": pl.String,
    "elevation": pl.Float64,
    "shard": pl.String,
    "row": pl.Int64,
    "captions": pl.List(CAPTION),
}


class DamagedSample(UserError):
    """A sample whose shard is missing or isn't what was written."""


@dataclass(frozen=True)
class Sample:
    """One cached sample: moments (T, 2C, h, w), image (T, E) and frame (3, H, W) in [-1, 1] as float32; texts (S, D)
    by caption, each with its captioner; the row of the index it came from."""

    moments: Tensor
    image: Tensor
    frame: Tensor
    texts: tuple[tuple[str, Tensor], ...]
    row: Mapping[str, Any]


def geometry_name(geometry: Geometry) -> str:
    """Return the key of a geometry in the index: frames, height, width, for example `14x320x576`."""
    return f"{geometry.frames}x{geometry.height}x{geometry.width}"


def digest(*parts: object) -> str:
    """Return 24 hexadecimal digits of the SHA-256 of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a shard atomically; a killed process leaves no half-written file under this name.

    Raises UserError for NaN and infinity, on which a training would stop.
    """
    require_finite(tensors, f"{path}")
    with atomic_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def write_index(folder: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], null_text: Tensor) -> None:
    """Write `index.parquet`, the facts that all samples share (`latents.json`), and the empty prompt's embedding.

    null_text: (S, D). `latents.json` is written last: where it is, the cache is complete.
    """
    frame = pl.DataFrame(list(rows), schema=SCHEMA).sort("geometry", "shard", "row")
    frame.write_parquet(folder / "index.parquet", statistics=False)
    save_file({"text": null_text.to(torch.float16).contiguous()}, folder / "null_text.safetensors")
    write_json(folder / "latents.json", dict(facts))


def _parse_geometry(name: str) -> Geometry:
    frames, height, width = map(int, name.split("x"))
    return Geometry(frames=frames, height=height, width=width)


class LatentCache:
    """A finished cache, read by random access; raises UserError when the folder holds none.

    Shards that are not in the folder may lie in a store (svd/latents/streaming.py).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "latents.json").is_file():
            raise UserError(f"{folder}: no latent cache here (latents.json is missing); run the stage 'latents' first")
        try:
            self.facts: dict[str, Any] = json.loads((folder / "latents.json").read_text())
            self.index: Index = OpenedIndex(folder / "index.parquet")
            with safe_open(folder / "null_text.safetensors", "pt"):
                pass
        except (OSError, ValueError, pa.ArrowException, SafetensorError) as error:
            raise UserError(f"{folder}: the latent cache is damaged ({error}); run the stage 'latents' again") from None
        self._streamed = streamed_shards(folder)
        self._handles: dict[str, Any] = {}

    def require_autoencoder(self, weights: str) -> None:
        """Raise UserError unless the autoencoder whose weights have this hash made the cache."""
        made_by = self.facts.get("autoencoder")
        if made_by != weights:
            raise UserError(
                f"{self.folder}: these latents are of the autoencoder {str(made_by)[:12]}, not of {weights[:12]}; "
                "run the stage 'latents' again"
            )

    @property
    def scaling_factor(self) -> float:
        """The factor that brings posterior samples to unit variance before diffusion."""
        return float(self.facts["scaling_factor"])

    @cached_property
    def null_text(self) -> Tensor:
        """The embedding of the empty prompt, (S, D) float32: the text of the unconditional branch."""
        with safe_open(self.folder / "null_text.safetensors", "pt") as file:
            return file.get_tensor("text").float()

    def rows(self, phase: Phase, split: str) -> Rows:
        """Select the samples that can feed a phase, by sample id: of its size, with the fewest frames that suffice.

        Raises UserError when there is none.
        """
        geometries = self.index.values("geometry")
        fitting = [g for g in map(_parse_geometry, geometries) if g.serves(phase)]
        if fitting:
            name = geometry_name(min(fitting, key=lambda g: g.frames))
            chosen = self.index.rows.where((pl.col("geometry") == name) & (pl.col("split") == split))
            if chosen:
                return chosen
        wanted = f"{phase.frames} frames of {phase.height}x{phase.width}"
        raise UserError(
            f"{self.folder}: no {split} samples with {wanted} (cached: {', '.join(geometries) or 'nothing'}); "
            "add the size to 'latents.geometries', or curate more and longer clips"
        )

    def read(self, row: Mapping[str, Any]) -> Sample:
        """Load the sample of an index row; raises DamagedSample when its shard is missing or can't be read."""
        path = self.folder / "shards" / row["shard"]
        try:
            return self._sample(self._open(path), row)
        except Unreachable:
            raise  # the store is away, the sample isn't damaged
        except (OSError, SafetensorError, IndexError) as error:
            where = f"row {row['row']} of {path} can't be read ({error})"
            raise DamagedSample(f"{where}; delete the shard and run the stage 'latents' again") from None

    def _sample(self, shard: Any, row: Mapping[str, Any]) -> Sample:
        number = row["row"]
        text = shard.get_slice("text") if row["captions"] else None
        return Sample(
            shard.get_slice("moments")[number].float(),
            shard.get_slice("image")[number].float(),
            shard.get_slice("frame")[number].float() / 127.5 - 1,
            tuple((c["captioner"], text[c["row"]].float()) for c in row["captions"]) if text else (),
            row,
        )

    def each(self, read: Callable[[int], T], indices: Sequence[int]) -> list[T]:
        """Return what `read` makes of each index, where shards are streamed in threads: their requests overlap."""
        if not self._streamed:
            return [read(index) for index in indices]
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(read, indices))

    def _open(self, path: Path) -> Any:
        """Open a shard, memory-mapped or in a store; the last 256 stay open."""
        handle = self._handles.get(path.name)
        if handle is None:
            elsewhere = self._streamed.get(path.name)
            handle = StreamedShard(elsewhere) if elsewhere else safe_open(path, "pt")
            self._handles[path.name] = handle
            for name in list(self._handles)[:-256]:  # other threads change it as well
                self._handles.pop(name, None)
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}
