"""Merging scored units into one catalogue: by content and in sorted order, so the order of the work is forgotten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from svd.config import CurationConfig
from svd.curation import catalog, filters
from svd.curation.duplicates import near_duplicates
from svd.curation.subsets import write_subsets
from svd.stage import write_json

# Buckets of the motion id that the model is conditioned on (spec: 0…255).
BUCKETS = 256
# What metrics are made of; captions and paths of ten million clips would not fit into memory.
SUMMARY_COLUMNS = [
    *("source_uri", "start_frame", "end_frame", "duration", "method", "camera", "text_area", "duplicate_similarity"),
    *catalog.VERDICTS_SCHEMA.names,
]


@dataclass(frozen=True)
class Merged:
    """The finished tables; `clips` has the columns SUMMARY_COLUMNS."""

    clips: pl.DataFrame
    sources: pl.DataFrame
    cuts: pl.DataFrame
    thresholds: Mapping[str, float]


def merge(measured: Sequence[Path], scored: Sequence[Path], finished: Path, config: CurationConfig) -> Merged:
    """Write catalogue, shards, flow and embeddings of all units into `finished`; units are given in their order."""
    for name in ("catalogue", "shards", "flow", "embeddings"):
        (finished / name).mkdir(parents=True, exist_ok=True)
    for one, other in zip(measured, scored, strict=True):
        _link(one / "flow.safetensors", finished / "flow" / f"{one.name}.safetensors")
        _link(other / "embeddings.safetensors", finished / "embeddings" / f"{one.name}.safetensors")
        for shard in sorted(other.glob("*.tar")):
            _link(shard, finished / "shards" / shard.name)
    sources = _resolve_duplicates(join_parts(_concat(measured, "sources")))
    tables = finished / "catalogue"
    units = list(zip(measured, scored, strict=True))
    _write_clips(tables / "clips.parquet", units, _global_columns(measured, sources, finished, config))
    cuts, dropped = _concat(measured, "cuts"), _concat(measured, "dropped")
    catalog.write_table(tables / "sources.parquet", catalog.with_schema(sources, catalog.SOURCES_SCHEMA))
    catalog.write_table(tables / "cuts.parquet", catalog.with_schema(cuts, catalog.CUTS_SCHEMA))
    catalog.write_table(tables / "dropped.parquet", catalog.with_schema(dropped, catalog.DROPPED_SCHEMA))
    thresholds = filters.write_verdicts(finished, config.filters)
    if config.subsets:
        write_subsets(finished, config.subsets)
    clips = catalog.scan_clips(finished).select(SUMMARY_COLUMNS).collect()
    return Merged(clips, sources, cuts, thresholds)


def _global_columns(
    measured: Sequence[Path], sources: pl.DataFrame, finished: Path, config: CurationConfig
) -> pl.DataFrame:
    """What depends on all clips, a narrow row a clip of the sources that count: motion bucket and near duplicates."""
    narrow = ("clip_id", "source_uri", "split", "unit", "motion_score")
    clips = pl.concat([pl.read_parquet(unit / "clips.parquet", columns=list(narrow)) for unit in measured])
    primary = sources.filter(pl.col("verdict") == "ok").select("source_uri")
    clips = clips.join(primary, on="source_uri", how="semi", maintain_order="left")
    clips = clips.with_columns(pl.Series("motion_bucket", motion_buckets(clips, finished), pl.Int16))
    if config.near_duplicates:
        clips = near_duplicates(clips, finished / "embeddings")
    return clips.drop("split", "unit", "motion_score")


def _write_clips(target: Path, units: Sequence[tuple[Path, Path]], columns: pl.DataFrame) -> None:
    """Write `clips.parquet` unit by unit, so that memory holds one unit; `columns` says which clips.

    Units hold sources in the order of their uris and clips in that of time, so the whole is sorted.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    with pq.ParquetWriter(temporary, catalog.SCORES_SCHEMA, compression="zstd") as writer:
        for measured, scored in units:
            scores = pl.read_parquet(scored / "scores.parquet")
            clips = pl.read_parquet(measured / "clips.parquet")
            clips = clips.join(scores, on="clip_id", how="left", maintain_order="left")
            clips = clips.join(columns, on=["clip_id", "source_uri"], how="inner", maintain_order="left")
            writer.write_table(catalog.with_schema(clips, catalog.SCORES_SCHEMA))
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(target)


def _concat(units: Sequence[Path], table: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(unit / f"{table}.parquet") for unit in units])


def join_parts(sources: pl.DataFrame) -> pl.DataFrame:
    """One row a source: those of the parts of a long one added up. It is usable when one of them is."""
    if sources["source_uri"].is_unique().all():
        return sources
    usable = pl.col("verdict") == "ok"
    summed = {name: pl.col(name).sum() for name in ("duration", "frames", "cuts", "clips")}
    failed = pl.col("reason").filter((pl.col("verdict") == "failed") & usable.any())
    told = pl.concat_list(
        pl.col("warnings").explode().drop_nulls().unique(maintain_order=True).implode(),
        pl.format("a part: {}", failed).unique(maintain_order=True).implode(),
    )
    rest = [n for n in sources.columns if n not in (*summed, "source_uri", "verdict", "reason", "warnings", "fps")]
    joined = sources.group_by("source_uri", maintain_order=True).agg(
        *(pl.col(name).drop_nulls().first() for name in rest),
        *(expression.alias(name) for name, expression in summed.items()),
        (pl.col("frames").sum() / pl.col("duration").sum()).cast(pl.Float32).alias("fps"),
        pl.when(usable.any()).then(pl.lit("ok")).otherwise(pl.col("verdict").first()).alias("verdict"),
        pl.when(usable.any()).then(pl.lit("")).otherwise(pl.col("reason").first()).alias("reason"),
        told.alias("warnings"),
    )
    return joined.select(sources.columns)


def _resolve_duplicates(sources: pl.DataFrame) -> pl.DataFrame:
    """Mark every source whose bytes came before under another uri; needed for sources hashed only once fetched."""
    sources = sources.sort("source_uri")
    first = pl.col("source_uri").first().over("source_id")
    again = pl.col("source_id").is_not_null() & (pl.col("verdict") == "ok") & (first != pl.col("source_uri"))
    return sources.with_columns(
        pl.when(again).then(pl.lit("duplicate")).otherwise("verdict").alias("verdict"),
        pl.when(again).then(pl.format("same bytes as {}", first)).otherwise("reason").alias("reason"),
        pl.when(again).then(first).otherwise("duplicate_of").alias("duplicate_of"),
        pl.when(again).then(0).otherwise("clips").alias("clips"),
    )


def motion_edges(scores: np.ndarray) -> np.ndarray:
    """The 255 inner edges of the 256 motion buckets: quantiles k / 256 of the catalogue's motion scores."""
    if not len(scores):
        return np.zeros(BUCKETS - 1)
    return np.quantile(scores.astype(np.float64), np.arange(1, BUCKETS) / BUCKETS)


def bucket(scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Motion bucket 0…255 of each score: the number of edges that are not above it.

    With the edges of its own catalogue a clip's bucket is its rank, so bucket 127 is the median clip, whatever the
    footage; another catalogue's clips are mapped with `catalogue/motion.json` of the one the model was trained on.
    """
    return np.searchsorted(edges, scores.astype(np.float64), side="right").astype(np.int16)


def motion_buckets(clips: pl.DataFrame, finished: Path) -> np.ndarray:
    """Bucket of every clip, from the edges over the clips that are not held out; writes `catalogue/motion.json`."""
    training = clips.filter(pl.col("split") != "test")
    reference = training if len(training) else clips
    edges = motion_edges(reference["motion_score"].drop_nulls().to_numpy()).round(6)
    write_json(finished / "catalogue" / "motion.json", {"edges": edges.tolist()})
    return bucket(clips["motion_score"].fill_null(0).to_numpy(), edges)


def _link(source: Path, target: Path) -> None:
    """Hard-link a finished file, or copy it where the file system can't link."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
