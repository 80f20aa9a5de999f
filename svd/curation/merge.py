"""Merging scored units into one catalogue, sorted by content: the order of the work leaves no trace."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from svd.catalogue import filters, schema, tables
from svd.catalogue.near_duplicates import near_duplicates
from svd.catalogue.subsets import write_subsets
from svd.config import CurationConfig
from svd.core.files import write_json

# Buckets of the motion id that the model is conditioned on: 0…255.
BUCKETS = 256
# Scores that follow from other columns of the clip, by the column of their axis.
KNOWN = {"resolution": pl.min_horizontal("width", "height"), "aspect": pl.col("width") / pl.col("height")}
# The columns that metrics need; captions and paths of ten million clips would not fit into memory.
CLIP_COLUMNS = ("duration", "method", "duplicate_similarity", "verdict", "keep")
SOURCE_COLUMNS = ("source_uri", "verdict", "reason")


@dataclass(frozen=True)
class Merged:
    """The finished tables in `folder`; in memory are CLIP_COLUMNS of clips and SOURCE_COLUMNS of sources."""

    folder: Path
    clips: pl.DataFrame
    sources: pl.DataFrame
    thresholds: Mapping[str, float]


def merge_units(measured: Sequence[Path], scored: Sequence[Path], finished: Path, config: CurationConfig) -> Merged:
    """Write catalogue, shards, flow and embeddings of all units into `finished`.

    Units are ordered by the uris of their sources. They are read one at a time: memory holds uris, verdicts and hashes
    of all sources, and a few numbers of all clips.
    """
    for name in ("catalogue", "shards", "flow", "embeddings"):
        (finished / name).mkdir(parents=True, exist_ok=True)
    for one, other in zip(measured, scored, strict=True):
        _link(one / "flow.safetensors", finished / "flow" / f"{one.name}.safetensors")
        _link(other / "embeddings.safetensors", finished / "embeddings" / f"{one.name}.safetensors")
        for shard in sorted(other.glob("*.tar")):
            _link(shard, finished / "shards" / shard.name)
    target = finished / "catalogue"
    again = _duplicates(measured)
    _write(target / "sources.parquet", _sources(measured, again), schema.SOURCES_SCHEMA)
    columns = _global_columns(measured, again, finished, config)
    shares = pl.read_parquet(target / "sources.parquet", columns=["source_uri", "decoded_share"])
    clips = (_with_known(part, shares) for part in _clips(measured, scored, again, columns))
    _write(target / "clips.parquet", clips, schema.SCORES_SCHEMA)
    for name, columns in (("cuts", schema.CUTS_SCHEMA), ("dropped", schema.DROPPED_SCHEMA)):
        _write(target / f"{name}.parquet", (pl.read_parquet(unit / f"{name}.parquet") for unit in measured), columns)
    thresholds = filters.write_verdicts(finished, config.filters)
    if config.subsets:
        write_subsets(finished, config.subsets)
    narrow = (
        tables.scan_clips(finished).select(CLIP_COLUMNS).with_columns(pl.col("method", "verdict").cast(pl.Categorical))
    )
    sources = pl.read_parquet(target / "sources.parquet", columns=list(SOURCE_COLUMNS))
    return Merged(finished, narrow.collect(engine="streaming"), sources, thresholds)


def _write(path: Path, frames: Iterable[pl.DataFrame], schema: pa.Schema) -> None:
    """Write frames one after another into one Parquet file under `schema`."""
    tables.write_stream(path, (tables.with_schema(frame, schema) for frame in frames), schema)


def _duplicates(measured: Sequence[Path]) -> dict[str, str]:
    """Map the uri of each duplicate source to the first uri with the same bytes.

    Duplicates among remote sources are found only here, because these are hashed once they are fetched.
    """
    narrow = ["source_uri", "source_id", "verdict"]
    rows = pl.concat([pl.read_parquet(unit / "sources.parquet", columns=narrow) for unit in measured])
    rows = rows.sort("source_uri").with_columns(first=pl.col("source_uri").first().over("source_id"))
    again = pl.col("source_id").is_not_null() & pl.col("verdict").is_in(["ok", "duplicate"])
    again &= pl.col("first") != pl.col("source_uri")
    return dict(rows.filter(again).select("source_uri", "first").iter_rows())


def _sources(measured: Sequence[Path], again: Mapping[str, str]) -> Iterator[pl.DataFrame]:
    """Yield the rows of all sources, with the parts of a long source joined; its units follow each other."""
    parts = pl.DataFrame()
    for unit in measured:
        rows = pl.read_parquet(unit / "sources.parquet").sort("source_uri")
        if len(parts):
            more = pl.col("source_uri") == parts["source_uri"][0]
            parts, rows = pl.concat([parts, rows.filter(more)]), rows.filter(~more)
        if len(rows):
            last = pl.col("source_uri") == rows["source_uri"][-1]
            yield from (_marked(join_parts(one), again) for one in (parts, rows.filter(~last)) if len(one))
            parts = rows.filter(last)
    yield _marked(join_parts(parts), again)


def _marked(sources: pl.DataFrame, again: Mapping[str, str]) -> pl.DataFrame:
    """Give the sources whose bytes came before the verdict "duplicate"."""
    first = pl.Series("first", [again.get(uri) for uri in sources["source_uri"]], pl.String)
    repeated = pl.col("first").is_not_null()
    return (
        sources.with_columns(first)
        .with_columns(
            pl.when(repeated).then(pl.lit("duplicate")).otherwise("verdict").alias("verdict"),
            pl.when(repeated).then(pl.format("same bytes as {}", "first")).otherwise("reason").alias("reason"),
            pl.coalesce("first", "duplicate_of").alias("duplicate_of"),
            pl.when(repeated).then(0).otherwise("clips").alias("clips"),
        )
        .drop("first")
    )


def _counting(
    unit: Path, again: Mapping[str, str], columns: Sequence[str] | None = None
) -> tuple[pl.DataFrame, pl.Series]:
    """Read columns of a unit's clips, and which clips count: those of duplicate sources don't."""
    clips = pl.read_parquet(unit / "clips.parquet", columns=[*columns, "source_uri"] if columns else None)
    return clips, pl.Series([uri not in again for uri in clips["source_uri"]], dtype=pl.Boolean)


def _global_columns(
    measured: Sequence[Path], again: Mapping[str, str], finished: Path, config: CurationConfig
) -> pl.DataFrame:
    """Compute the columns that depend on all clips, motion bucket and near duplicates: one row per clip that counts."""
    wanted = ("split", "motion_score", *(("clip_id", "unit") if config.near_duplicates else ()))
    parts = []
    for unit in measured:
        clips, counts = _counting(unit, again, wanted)
        parts.append(clips.filter(counts).select(pl.col("split").cast(pl.Categorical), *wanted[1:]))
    clips = pl.concat(parts, rechunk=True)
    columns = [pl.Series("motion_bucket", motion_buckets(clips, finished), pl.Int16)]
    if config.near_duplicates:
        found = near_duplicates(clips, finished / "embeddings")
        columns += [found["duplicate_of"], found["duplicate_similarity"]]
    return pl.DataFrame(columns)


def _clips(
    measured: Sequence[Path], scored: Sequence[Path], again: Mapping[str, str], columns: pl.DataFrame
) -> Iterator[pl.DataFrame]:
    """Yield the clips that count with their scores; `columns` has one row for each of them.

    Units hold sources in the order of their uris and clips in the order of time, so the whole is sorted. Scores are in
    the order of the clips. Ids can't join them: two sources of equal bytes in one unit have clips with equal ids.
    """
    at = 0
    for one, other in zip(measured, scored, strict=True):
        clips, counts = _counting(one, again)
        scores = pl.read_parquet(other / "scores.parquet")
        if not scores["clip_id"].equals(clips["clip_id"]):
            raise RuntimeError(f"{other}: its scores are not those of the clips of {one}")
        clips = clips.hstack(scores.drop("clip_id")).filter(counts)
        yield clips.hstack(columns.slice(at, len(clips)))
        at += len(clips)


def _with_known(clips: pl.DataFrame, shares: pl.DataFrame) -> pl.DataFrame:
    """Add the scores that are known of a clip and of its source; shares: `source_uri` and `decoded_share`."""
    return clips.with_columns(**KNOWN).join(shares, on="source_uri", how="left", maintain_order="left")


def join_parts(sources: pl.DataFrame) -> pl.DataFrame:
    """Join the rows of the parts of a long source into one row; the source is usable when one part is."""
    if sources["source_uri"].is_unique().all():
        return sources
    usable = pl.col("verdict") == "ok"
    share, seconds = pl.col("decoded_share"), pl.col("duration")
    summed = {name: pl.col(name).sum() for name in ("duration", "frames", "cuts", "clips")}
    failed = pl.col("reason").filter((pl.col("verdict") == "failed") & usable.any())
    warnings = pl.concat_list(
        pl.col("warnings").explode().drop_nulls().unique(maintain_order=True).implode(),
        pl.format("a part: {}", failed).unique(maintain_order=True).implode(),
    )
    made = (*summed, "source_uri", "verdict", "reason", "warnings", "fps", "decoded_share")
    rest = [name for name in sources.columns if name not in made]
    joined = sources.group_by("source_uri", maintain_order=True).agg(
        *(pl.col(name).drop_nulls().first() for name in rest),
        *(expression.alias(name) for name, expression in summed.items()),
        (pl.col("frames").sum() / pl.col("duration").sum()).cast(pl.Float32).alias("fps"),
        # Without any share this is 0 / 0, which a table stores as null.
        ((share * seconds).sum() / seconds.filter(share.is_not_null()).sum()).cast(pl.Float32).alias("decoded_share"),
        pl.when(usable.any()).then(pl.lit("ok")).otherwise(pl.col("verdict").first()).alias("verdict"),
        pl.when(usable.any()).then(pl.lit("")).otherwise(pl.col("reason").first()).alias("reason"),
        warnings.alias("warnings"),
    )
    return joined.select(sources.columns)


def motion_edges(scores: np.ndarray) -> np.ndarray:
    """Return the 255 inner edges of the 256 motion buckets: the quantiles k / 256 of the motion scores."""
    if not len(scores):
        return np.zeros(BUCKETS - 1)
    return np.quantile(scores.astype(np.float64), np.arange(1, BUCKETS) / BUCKETS)


def bucket(scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the motion bucket 0…255 of each score: the number of edges that are at most the score.

    With the edges of its own catalogue the bucket of a clip is its rank, so bucket 127 is the median clip, whatever the
    footage. Clips of another catalogue are mapped with `catalogue/motion.json` of the one the model was trained on.
    """
    return np.searchsorted(edges, scores.astype(np.float64), side="right").astype(np.int16)


def motion_buckets(clips: pl.DataFrame, finished: Path) -> np.ndarray:
    """Return the bucket of every clip, by edges from clips that are not held out; write `catalogue/motion.json`."""
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
