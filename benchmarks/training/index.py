"""Open the index of ten million cached samples in two processes, as ranks do: seconds and memory.

    python -m benchmarks.training.index [--rows N] [--folder F]

Writes a synthetic index with every column filled (once; it is kept). Each process opens it, selects the training
samples of a phase and three quarters of them by motion, and reads 10,000 at random; then both say how much memory they
have got, shared pages counted once (PSS). Beside it the way of before, a list of dicts, at a hundredth of the rows.
Demanded at ten million rows: < 60 s, < 2 GB for both processes.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import resource
import shutil
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from svd.catalogue.axes import SUBSET_AXES
from svd.latents.cache import SCHEMA
from svd.latents.index import OpenedIndex

CHUNK = 1 << 17
SHARD = 1024  # samples, as in presets/paper.yaml
READ = 10_000
RANKS = 2
WORDS = np.array(["a", "the", "red", "blue", "dog", "man", "car", "street", "runs", "walks", "over", "under", "house"])
CAMERAS = np.array(["static", "pan-left", "zoom-in", "unsteady"])
GEOMETRY = "14x320x576"


@functools.cache
def captions() -> pl.Series:
    """Two captions of twelve words a sample; every chunk has the same ones, selecting never reads them."""
    words = WORDS[np.random.default_rng(0).integers(0, len(WORDS), (CHUNK, 2, 12))]
    rows = [
        [
            {"captioner": name, "text": " ".join(pair[k]), "row": 2 * (number % SHARD) + k}
            for k, name in enumerate(("coca", "llm"))
        ]
        for number, pair in enumerate(words)
    ]
    return pl.Series(rows, dtype=SCHEMA["captions"])


def chunk(start: int, count: int) -> pa.Table:
    """Rows [start, start + count) of the synthetic index."""
    draw = np.random.default_rng(start)
    numbers, ids = np.arange(start, start + count), draw.bytes(28 * count).hex()
    columns: dict[str, Any] = {
        "sample_id": [ids[56 * n : 56 * n + 24] for n in range(count)],
        "clip_id": [ids[56 * n + 24 : 56 * n + 56] for n in range(count)],
        "geometry": [GEOMETRY] * count,
        "split": np.where(draw.random(count) < 0.02, "test", "train"),
        "fps": 30 / draw.integers(1, 6, count),
        "motion_bucket": draw.integers(0, 256, count),
        **{axis.column: draw.random(count) for axis in SUBSET_AXES},
        "camera": CAMERAS[draw.integers(0, len(CAMERAS), count)],
        "elevation": np.zeros(count),
        "shard": [f"{GEOMETRY}-{number:024x}.safetensors" for number in numbers // SHARD],
        "row": numbers % SHARD,
        "captions": captions()[:count],
    }
    return pl.DataFrame(columns, schema=SCHEMA).to_arrow()


def write_rows(path: Path, rows: int) -> None:
    """Write the index, chunk by chunk; a finished one is kept."""
    if path.is_file() and pq.read_metadata(path).num_rows == rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    schema = chunk(0, 1).schema
    with pq.ParquetWriter(temporary, schema, compression="zstd", write_statistics=False) as writer:
        for start in track(range(0, rows, CHUNK), "writing synthetic index"):
            writer.write_table(chunk(start, min(CHUNK, rows - start)))
    temporary.replace(path)


def megabytes() -> float:
    """Return this process' memory; a page that it shares with another counts half."""
    return float(psutil.Process().memory_full_info().pss / 1e6)


def cpu_seconds() -> float:
    """Return the CPU time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def mapped(path: Path, gate: Barrier, answers: Any) -> None:
    """Open, select and read as a rank; `gate` keeps both processes alive while they are measured."""
    before, began = megabytes(), time.perf_counter()
    opened = OpenedIndex(path)
    at_open = time.perf_counter()
    wanted = (pl.col("geometry") == GEOMETRY) & (pl.col("split") == "train")
    rows = opened.rows.where(wanted)
    rows = rows.where(pl.col("motion_score") >= rows.column("motion_score").quantile(0.25, "lower"))
    selected = time.perf_counter()
    draw = random.Random(os.getpid())
    for _ in range(READ):
        rows[draw.randrange(len(rows))]
    read = time.perf_counter()
    gate.wait()
    found = {"open": at_open - began, "select": selected - at_open, "read": read - selected, "cpu": cpu_seconds()}
    answers.put(found | {"megabytes": megabytes() - before, "imports": before})
    gate.wait()


def listed(path: Path, gate: Barrier, answers: Any) -> None:
    """Open, select and keep the rows as dicts, as ranks did before."""
    before, began = megabytes(), time.perf_counter()
    table = pl.read_parquet(path)
    at_open = time.perf_counter()
    rows = table.filter((pl.col("geometry") == GEOMETRY) & (pl.col("split") == "train")).sort("sample_id")
    threshold = rows["motion_score"].quantile(0.25, "lower")
    every = rows.filter(pl.col("motion_score") >= threshold).to_dicts()
    selected = time.perf_counter()
    gate.wait()
    found = {"open": at_open - began, "select": selected - at_open, "read": 0.0, "cpu": cpu_seconds()}
    answers.put(found | {"megabytes": megabytes() - before, "imports": before, "kept": len(every)})
    gate.wait()


def in_ranks(work: Any, path: Path) -> list[dict[str, float]]:
    """Run `work` in RANKS processes at once; return what each has measured."""
    context = multiprocessing.get_context("spawn")
    gate, answers = context.Barrier(RANKS), context.SimpleQueue()
    processes = [context.Process(target=work, args=(path, gate, answers)) for _ in range(RANKS)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def tell(what: str, found: list[dict[str, float]], scale: int = 1) -> None:
    """Print one JSON line: the slowest rank's seconds, and the memory of all."""
    seconds = {name: round(scale * max(rank[name] for rank in found), 2) for name in ("open", "select", "read", "cpu")}
    memory = {
        "gigabytes": round(scale * sum(rank["megabytes"] for rank in found) / 1e3, 2),
        "imports_gigabytes": round(sum(rank["imports"] for rank in found) / 1e3, 2),
    }
    print(json.dumps({"what": what, **seconds, **memory}), flush=True)


def main() -> None:
    """Write the indexes and measure each way in fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=Path("work/benchmarks/index"))
    arguments = parser.parse_args()
    whole, part = (arguments.folder / str(count) / "index.parquet" for count in (arguments.rows, arguments.rows // 100))
    write_rows(whole, arguments.rows)
    write_rows(part, arguments.rows // 100)
    os.environ["SVD_CACHE"] = str(arguments.folder / "cache")
    shutil.rmtree(arguments.folder / "cache", ignore_errors=True)
    tell(f"{arguments.rows} rows, first time on this machine", in_ranks(mapped, whole))
    tell(f"{arguments.rows} rows, opened again", in_ranks(mapped, whole))
    tell(f"lists of dicts, {arguments.rows // 100} rows times 100", in_ranks(listed, part), 100)


if __name__ == "__main__":
    main()
