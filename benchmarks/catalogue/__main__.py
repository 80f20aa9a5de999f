"""Re-filter and summarise a catalogue of ten million clips: `python -m benchmarks.catalogue [--rows N] [--folder F]`.

Writes a synthetic catalogue with every column filled (once; it is kept), then runs the real `write_verdicts` and the
real statistics in a process of its own and prints wall time, CPU time and peak memory. Demanded: < 60 s and < 4 GB.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from svd.catalogue import axes, schema, tables

CHUNK = 1 << 18
FILTERS = {
    "min_motion": {"quantile": 0.25},
    "min_aesthetics": {"quantile": 0.25},
    "min_similarity": {"quantile": 0.5},
    "max_text_area": {"quantile": 0.25},
}
WORDS = np.array(["a", "the", "red", "blue", "dog", "man", "car", "street", "runs", "walks", "over", "under", "house"])


@functools.cache
def captions() -> pl.Series:
    """Two captions a clip; every chunk has the same ones, filtering never reads them."""
    words = WORDS[np.random.default_rng(0).integers(0, len(WORDS), (CHUNK, 2, 8))]
    rows = [
        [{"captioner": c, "text": " ".join(w)} for c, w in zip(("coca", "video"), row, strict=True)] for row in words
    ]
    return pl.Series(rows, dtype=pl.List(pl.Struct({"captioner": pl.String, "text": pl.String})))


def peak_bytes() -> int:
    """Largest resident memory of this process; getrusage would also count the parent's before exec."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def chunk(start: int, count: int) -> pa.Table:
    """Rows [start, start + count) of the synthetic catalogue, each with two captions."""
    generator = np.random.default_rng(start)
    numbers = np.arange(start, start + count)
    clip_ids = [generator.bytes(16).hex() for _ in range(count)]
    frames = generator.integers(24, 900, count)
    frame = pl.DataFrame(
        {
            "clip_id": clip_ids,
            "source_id": [f"{n // 11:032x}" for n in numbers],
            "source_uri": [f"s3://videos/{n // 11:010d}.mp4" for n in numbers],
            "split": ["train"] * count,
            "unit": (numbers // 700).astype(np.int32),
            "start_frame": (numbers % 11) * 900,
            "end_frame": (numbers % 11) * 900 + frames,
            "start_seconds": (numbers % 11) * 30.0,
            "end_seconds": (numbers % 11) * 30.0 + frames / 30,
            "duration": frames / 30,
            "frames": frames.astype(np.int32),
            "fps": np.full(count, 30.0, np.float32),
            "width": np.full(count, 1280, np.int32),
            "height": np.full(count, 720, np.int32),
            "codec": ["h264"] * count,
            "method": ["copy"] * count,
            "motion_score": generator.lognormal(-1.5, 1, count).astype(np.float32),
            "camera": WORDS[generator.integers(0, 8, count)],
            "text_area": (generator.random(count) ** 6).astype(np.float32),
            "aesthetics": generator.normal(4.8, 0.7, count).astype(np.float32),
            "similarity": generator.normal(0.26, 0.04, count).astype(np.float32),
            "captions": captions()[:count],
            "shard": [f"clips-{n // 700:06d}.tar" for n in numbers],
            "offset": (numbers % 700) * 1_500_000,
            "size": generator.integers(500_000, 2_000_000, count),
            "motion_bucket": generator.integers(0, 256, count).astype(np.int16),
        }
    )
    return tables.with_schema(frame, schema.SCORES_SCHEMA)


def write_catalogue(folder: Path, rows: int) -> None:
    """Write the catalogue, chunk by chunk; a finished one is kept."""
    target = folder / "catalogue" / "clips.parquet"
    if target.is_file() and pq.read_metadata(target).num_rows == rows:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    with pq.ParquetWriter(temporary, schema.SCORES_SCHEMA, compression="zstd") as writer:
        for start in track(range(0, rows, CHUNK), "writing synthetic catalogue"):
            writer.write_table(chunk(start, min(CHUNK, rows - start)), row_group_size=tables.ROW_GROUP)
    temporary.replace(target)


def measure(folder: Path) -> None:
    """What is timed: verdicts, funnel, Tab. 1 of all and kept clips, histograms of every axis. Prints one JSON line."""
    from svd.catalogue import filters, statistics
    from svd.config import FiltersConfig

    began = time.perf_counter()
    thresholds = filters.write_verdicts(folder, FiltersConfig.model_validate(FILTERS))
    filtered = time.perf_counter()
    clips = tables.scan_clips(folder)
    rows = {"all": statistics.dataset_row(clips), "kept": statistics.dataset_row(clips.filter(pl.col("keep")))}
    counted = [len(statistics.histogram(clips, column)[0]) for column in axes.axes_by_column()]
    finished = time.perf_counter()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "filter_seconds": round(filtered - began, 2),
        "summary_seconds": round(finished - filtered, 2),
        "wall_seconds": round(finished - began, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_gigabytes": round(peak_bytes() / 1e9, 3),
        "thresholds": thresholds,
        "kept": rows["kept"]["clips"],
        "rows": rows["all"]["clips"],
        "histograms": sum(1 for bins in counted if bins),
    }
    print(json.dumps(result))


def main() -> None:
    """Write the catalogue and measure in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=Path("work/benchmarks/catalogue"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.folder)
        return
    write_catalogue(arguments.folder, arguments.rows)
    command = [sys.executable, "-m", "benchmarks.catalogue", "--measure", "--folder", str(arguments.folder)]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="")


if __name__ == "__main__":
    main()
