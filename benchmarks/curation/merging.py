"""Merging the units of a large run into one catalogue: wall time and peak memory.

    python -m benchmarks.curation.merging [--units 2000] [--clips 500] [--folder F]

Writes the tables of synthetic measured and scored units, ten clips a source (once; they are kept), then merges them as
curation does and computes its metrics, in a process of its own. Near duplicates are left out: they are a matter of
embeddings.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from rich.progress import track

from benchmarks.catalogue.__main__ import chunk, peak_bytes
from svd.catalogue import schema, tables
from svd.config.load import load_preset
from svd.curation.merge import merge_units
from svd.curation.metrics import curation_metrics

PER_SOURCE = 10


@functools.cache
def evidence(clips: int) -> tuple[pa.Table, pa.Table]:
    """Cuts and dropped spans of `clips` clips, all but their sources, as often as in footage of television."""
    random = np.random.default_rng(0)
    start = random.integers(0, 10**5, 3 * clips // 2)
    cuts = pl.DataFrame({"frame": start, "start_frame": start, "end_frame": start, "seconds": start / 30})
    cuts = cuts.with_columns(kind=pl.lit("hard"), detector=pl.lit("content@1"), score=pl.lit(50.0), threshold=27.0)
    dropped = cuts.select("start_frame", "end_frame", start_seconds="seconds", end_seconds="seconds")
    dropped = dropped.with_columns(reason=pl.lit("shorter than 2 s between two cuts")).head(clips // 3)
    return tables.with_schema(cuts, schema.CUTS_SCHEMA), tables.with_schema(dropped, schema.DROPPED_SCHEMA)


def write_unit(folder: Path, number: int, clips: int) -> None:
    """The tables of one unit; its shard, flow and embeddings are empty files."""
    name = f"clips-{number:06d}"
    measured, scored = folder / "measured" / name, folder / "scored" / name
    for path in (measured, scored):
        path.mkdir(parents=True)
    numbers = np.arange(number * clips, (number + 1) * clips) // PER_SOURCE
    uris = pl.Series("source_uri", [f"s3://videos/a-folder-of-a-collection/{n:010d}.mp4" for n in numbers])
    table = pl.DataFrame(chunk(number * clips, clips))
    table = table.with_columns(uris, unit=pl.lit(number, pl.Int32), split=pl.lit("train"))
    for path, columns in ((measured / "clips", schema.MEASURED_SCHEMA), (scored / "scores", schema.SCORED_SCHEMA)):
        tables.write_table(path.with_suffix(".parquet"), tables.with_schema(table, columns))
    sources = table.group_by("source_uri", "split", "codec", maintain_order=True).agg(
        pl.len().alias("clips"),
        pl.col("duration").sum(),
        pl.col("source_uri").first().hash().cast(pl.String).alias("source_id"),
    )
    sources = sources.with_columns(
        verdict=pl.lit("ok"), reason=pl.lit(""), metadata=pl.lit(json.dumps({"title": "a video " * 10, "views": 12345}))
    )
    tables.write_table(measured / "sources.parquet", tables.with_schema(sources, schema.SOURCES_SCHEMA))
    for path, rows in zip((measured / "cuts", measured / "dropped"), evidence(clips), strict=True):
        owners = pa.array(np.sort(np.resize(uris.to_numpy(), len(rows))).tolist(), pa.string())
        tables.write_table(path.with_suffix(".parquet"), rows.set_column(0, "source_uri", owners).cast(rows.schema))
    for path in (measured / "flow.safetensors", scored / "embeddings.safetensors", scored / f"{name}.tar"):
        path.touch()


def run(folder: Path, units: int) -> None:
    """Merge, compute the metrics, print one line."""
    finished = folder / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    paths = [[folder / kind / f"clips-{n:06d}" for n in range(units)] for kind in ("measured", "scored")]
    config = load_preset("paper", {"curation.near_duplicates": False}).curation
    began, base = time.perf_counter(), peak_bytes()
    merged = merge_units(*paths, finished, config)
    merging = time.perf_counter() - began
    values = curation_metrics(merged, folder)
    counts = ", ".join(f"{values[name]} {name}" for name in ("sources", "clips", "clips_kept", "cuts"))
    print(f"{counts}: merged in {merging:.1f} s, metrics {time.perf_counter() - began - merging:.1f} s")
    print(f"peak {peak_bytes() / 1e6:.0f} MB, {base / 1e6:.0f} MB of it before")


def main() -> None:
    """Write the units, merge them in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=2_000)
    parser.add_argument("--clips", type=int, default=500, help="clips of a unit")
    parser.add_argument("--folder", type=Path, default=Path("work/benchmarks/merging"))
    options = parser.parse_args()
    for number in track(range(options.units), "writing synthetic units"):
        if not (options.folder / "scored" / f"clips-{number:06d}" / f"clips-{number:06d}.tar").is_file():
            write_unit(options.folder, number, options.clips)
    process = multiprocessing.get_context("spawn").Process(target=run, args=(options.folder, options.units))
    process.start()
    process.join()


if __name__ == "__main__":
    main()
