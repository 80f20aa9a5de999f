"""Stage `latents`: every kept clip of the catalogue, encoded once for each geometry of the preset (§2, D.2).

svd/latents/cache.py describes the files. Training reads them instead of running the autoencoder and the text and image
encoders, which raises its throughput by a fifth to a quarter. Shards are independent: a killed run keeps the finished
ones, and a cluster can write them in any order on any machine.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

from svd.catalogue.axes import SUBSET_AXES
from svd.catalogue.shards import read_clip_bytes
from svd.catalogue.tables import read_clips
from svd.config import Geometry, LatentsConfig, Preset
from svd.core.device import pick_device
from svd.core.errors import UserError
from svd.core.files import write_json
from svd.latents.cache import digest, geometry_name, write_index, write_shard
from svd.latents.windows import UnreadableClip, Window, choose_windows, cover_frames, decode_frames
from svd.model.formats.encoders import load_encoders
from svd.model.formats.folders import checkpoint_hash, load_autoencoder
from svd.stage import Report, StageContext, publish

FRAMES_AT_ONCE = 64
HELD_OUT = 0.02


@dataclass(frozen=True)
class Job:
    """A sample to encode: a window of a catalogue row at a geometry."""

    sample_id: str
    row: Mapping[str, Any]
    geometry: Geometry
    window: Window


class LatentEncoder:
    """The frozen networks of the cache: autoencoder, text and image encoder, on the GPU when there is one."""

    def __init__(self, autoencoder: Path, encoders: Path, context: StageContext) -> None:
        self.device = torch.device(pick_device())
        self.autoencoder = load_autoencoder(autoencoder, device=self.device).eval().requires_grad_(False)
        self.encoders = load_encoders(encoders, context.preset.encoders, self.device)
        self.autoencoder_hash = checkpoint_hash(autoencoder)
        self.identity = digest(self.autoencoder_hash, checkpoint_hash(encoders))
        self.scaling_factor = float(self.autoencoder.config.scaling_factor)

    def facts(self) -> dict[str, Any]:
        """Return what a cache says of the networks that made it."""
        return {
            "weights": self.identity,
            "autoencoder": self.autoencoder_hash,
            "scaling_factor": self.scaling_factor,
        }

    @torch.inference_mode()
    def videos(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Encode (N, T, 3, H, W) uint8 to moments (N, T, 2C, h, w) bf16 and CLIP embeddings (N, T, E) fp16."""
        count = max(1, FRAMES_AT_ONCE // frames.shape[1])
        moments, images = [], []
        for part in frames.split(count):
            pixels = part.to(self.device).float() / 127.5 - 1
            moments.append(self.autoencoder.encode(pixels).to("cpu", torch.bfloat16))
            embedded = self.encoders.image(pixels.flatten(0, 1)).unflatten(0, part.shape[:2])
            images.append(embedded.to("cpu", torch.float16))
        return torch.cat(moments), torch.cat(images)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed M texts as tokens, (M, S, D) fp16."""
        parts = [texts[i : i + FRAMES_AT_ONCE] for i in range(0, len(texts), FRAMES_AT_ONCE)]
        return torch.cat([self.encoders.text(list(part)).to("cpu", torch.float16) for part in parts])


def with_split(clips: pl.DataFrame) -> pl.DataFrame:
    """Give every clip a `split`, train or test: the catalogue's own, or, without a test set there, a few held out.

    Whole sources are held out, chosen by the hash of their id; of a single source one clip.
    """
    if (clips["split"] == "test").any() or clips.is_empty():
        return clips.with_columns(split=pl.when(pl.col("split") == "test").then("split").otherwise(pl.lit("train")))
    sources = sorted(clips["source_id"].unique(), key=lambda name: digest("held out", name))
    held_out = sources[: max(1, round(HELD_OUT * len(sources)))] if len(sources) > 1 else []
    test = pl.col("source_id").is_in(held_out)
    if not held_out:
        test = pl.col("clip_id") == min(clips["clip_id"])
    return clips.with_columns(split=pl.when(test).then(pl.lit("test")).otherwise(pl.lit("train")))


def plan_shards(clips: pl.DataFrame, config: LatentsConfig, identity: str) -> list[list[Job]]:
    """List the samples of every shard, in a fixed order; a shard holds one geometry.

    identity: hash of the encoding networks, which is part of every sample's id.
    """
    shards: list[list[Job]] = []
    for geometry in sorted(config.geometries, key=geometry_name):
        jobs = []
        for row in clips.sort("clip_id").iter_rows(named=True):
            rates = config.min_fps, config.max_fps
            for window in choose_windows(
                row["clip_id"], row["frames"], row["fps"], geometry.frames, rates, config.windows
            ):
                key = digest(row["clip_id"], geometry_name(geometry), window.start, window.stride, identity)
                jobs.append(Job(key, row, geometry, window))
        size = config.samples_per_shard
        shards += [jobs[i : i + size] for i in range(0, len(jobs), size)]
    return shards


def _decode_clip(curation: Path, jobs: Sequence[Job]) -> list[tuple[Job, Tensor | None]]:
    """Read the frames (T, 3, H, W) uint8 of all samples of one clip; None for a clip that can't be read."""
    wanted = {number for job in jobs for number in job.window.indices}
    try:
        frames = decode_frames(read_clip_bytes(curation, jobs[0].row), wanted)
    except UnreadableClip as error:
        tqdm.write(f"clip {jobs[0].row['clip_id']} left out: {error}")
        return [(job, None) for job in jobs]
    return [
        (job, cover_frames([frames[n] for n in job.window.indices], job.geometry.height, job.geometry.width))
        for job in jobs
    ]


def _decoded(curation: Path, jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Tensor]]:
    """Yield samples in the order of `jobs`, decoded by `workers` threads (PyAV releases the interpreter lock)."""
    groups = [list(group) for _, group in groupby(jobs, key=lambda job: job.row["clip_id"])]
    with ThreadPoolExecutor(workers) as pool:
        for results in pool.map(lambda group: _decode_clip(curation, group), groups):
            yield from ((job, frames) for job, frames in results if frames is not None)


def _index_row(job: Job, shard: str, number: int, texts: Mapping[str, int]) -> dict[str, Any]:
    row = job.row
    captions = [
        {"captioner": c["captioner"], "text": c["text"], "row": texts[c["text"]]} for c in row["captions"] or []
    ]
    return {
        "sample_id": job.sample_id,
        "clip_id": row["clip_id"],
        "geometry": geometry_name(job.geometry),
        "split": row["split"],
        "fps": job.window.fps,
        "motion_bucket": row["motion_bucket"] or 0,
        **{axis.column: row[axis.column] for axis in SUBSET_AXES},
        "camera": row["camera"],
        "elevation": 0.0,
        "shard": shard,
        "row": number,
        "captions": captions,
    }


def encode_shard(jobs: Sequence[Job], curation: Path, encoder: LatentEncoder, folder: Path, workers: int) -> Path:
    """Encode one shard and its part of the index; return the path of that part.

    The part, `<shard>.json`, is written last: where it is, the shard is complete.
    """
    name = f"{geometry_name(jobs[0].geometry)}-{digest(*[job.sample_id for job in jobs])}.safetensors"
    done = folder / f"{name}.json"
    if done.exists():
        return done
    kept: list[Job] = []
    tensors: dict[str, list[Tensor]] = {"moments": [], "image": [], "frame": []}
    pending: list[Tensor] = []

    def encode() -> None:
        moments, image = encoder.videos(torch.stack(pending))
        tensors["moments"].append(moments)
        tensors["image"].append(image)
        pending.clear()

    for job, frames in _decoded(curation, jobs, workers):
        kept.append(job)
        pending.append(frames)
        tensors["frame"].append(frames[:1])
        if len(pending) * len(frames) >= FRAMES_AT_ONCE:
            encode()
    if pending:
        encode()
    texts = {text: i for i, text in enumerate(sorted({c["text"] for job in kept for c in job.row["captions"] or []}))}
    content = {key: torch.cat(parts) for key, parts in tensors.items() if parts}
    if texts:
        content["text"] = encoder.texts(list(texts))
    if kept:
        write_shard(folder / name, content)
    write_json(done, [_index_row(job, name, number, texts) for number, job in enumerate(kept)])
    return done


def encode_clips(
    clips: pl.DataFrame, preset: Preset, curation: Path, encoder: LatentEncoder, work: Path
) -> list[dict[str, Any]]:
    """Encode catalogue rows with a `split` into `work/shards`; return the index rows. Finished shards are kept."""
    shards = plan_shards(clips, preset.latents, encoder.identity)
    made = work / "shards"
    made.mkdir(parents=True, exist_ok=True)
    parts = []
    with tqdm(total=sum(map(len, shards)), desc="latents", unit="clip") as bar:
        for jobs in shards:
            parts.append(encode_shard(jobs, curation, encoder, made, preset.compute.latents.workers))
            bar.update(len(jobs))
    return [row for part in parts for row in json.loads(part.read_text())]


def run(context: StageContext) -> Report:
    """Encode all kept clips; inputs: `curation`, `autoencoder`, `encoders`. Raises UserError when none can be used."""
    curation = context.inputs["curation"]
    encoder = LatentEncoder(context.inputs["autoencoder"], context.inputs["encoders"], context)
    clips = with_split(read_clips(curation).filter(pl.col("keep")))
    rows = encode_clips(clips, context.preset, curation, encoder, context.work)
    if not any(row["split"] == "train" for row in rows):
        raise UserError(
            f"{curation}: none of the {len(clips)} kept clips yields a training sample; "
            "loosen curation.filters, or lower 'frames' or raise 'max_fps' in 'latents'"
        )
    finished = assemble(context.work, rows, encoder)
    return publish(finished, context.output, _report(clips, rows))


def assemble(work: Path, rows: Sequence[Mapping[str, Any]], encoder: LatentEncoder) -> Path:
    """Make `work/finished`, a cache of the `rows` from `encode_clips`: hard links to the shards, and the index."""
    finished = work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    (finished / "shards").mkdir(parents=True)
    for name in sorted({row["shard"] for row in rows}):
        os.link(work / "shards" / name, finished / "shards" / name)
    facts = encoder.facts() | {"samples": len(rows), "factor": encoder.autoencoder.factor}
    write_index(finished, rows, facts, encoder.texts([""])[0])
    return finished


def _report(clips: pl.DataFrame, rows: Sequence[Mapping[str, Any]]) -> Report:
    used = {row["clip_id"] for row in rows}
    train = sum(row["split"] == "train" for row in rows)
    metrics: dict[str, float | int | str] = {
        "clips": len(clips),
        "clips_used": len(used),
        "clips_too_short_or_unreadable": len(clips) - len(used),
        "samples_train": train,
        "samples_test": len(rows) - train,
    }
    return Report(
        metrics, f"{train} training and {len(rows) - train} test samples from {len(used)} of {len(clips)} clips"
    )
