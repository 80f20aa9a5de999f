"""Merging: units of any size give the tables that all their rows give together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from svd.catalogue import schema, tables
from svd.config.load import load_preset
from svd.curation.merge import merge_units

Row = dict[str, Any]


def write_unit(folder: Path, number: int, sources: list[Row], clips: list[Row], cuts: list[Row]) -> tuple[Path, Path]:
    """A measured and a scored unit; every clip's score is told by its row alone."""
    measured, scored = folder / "measured" / f"clips-{number:06d}", folder / "scored" / f"clips-{number:06d}"
    for path in (measured, scored):
        path.mkdir(parents=True)
    tables.write_table_rows(measured / "sources.parquet", sources, schema.SOURCES_SCHEMA)
    tables.write_table_rows(measured / "clips.parquet", clips, schema.MEASURED_SCHEMA)
    tables.write_table_rows(measured / "cuts.parquet", cuts, schema.CUTS_SCHEMA)
    tables.write_table_rows(measured / "dropped.parquet", [], schema.DROPPED_SCHEMA)
    scores = [{"clip_id": row["clip_id"], "aesthetics": row["motion_score"] + 1} for row in clips]
    tables.write_table_rows(scored / "scores.parquet", scores, schema.SCORED_SCHEMA)
    for path in (measured / "flow.safetensors", scored / "embeddings.safetensors"):
        path.touch()
    return measured, scored


def source_rows(random: np.random.Generator, name: str, content: str, number: int) -> tuple[Row, list[Row], list[Row]]:
    """A source, or one part of it, with its clips and cuts."""
    count = int(random.integers(0, 4))
    failed = bool(random.random() < 0.2)
    row = {"source_uri": name, "source_id": content, "verdict": "ok" if count else "no-clips", "reason": ""}
    row |= {"frames": 50 * count, "duration": 2.0 * count, "fps": 25.5, "clips": count, "cuts": 1, "warnings": []}
    row |= {"decoded_share": random.choice([None, 0.5, 1.0])}
    if failed:
        return row | {"verdict": "failed", "reason": "broken", "clips": 0, "warnings": None}, [], []
    starts = [1000 * number + 100 * n for n in range(count)]
    clips = [
        {
            "clip_id": f"{content}-{start}",
            "source_uri": name,
            "source_id": content,
            "split": "train",
            "start_frame": start,
        }
        | {"motion_score": float(np.float32(random.random())), "duration": 2.0, "method": "copy"}
        | {"width": 1000 + start, "height": 1500}
        for start in starts
    ]
    return row, clips, [{"source_uri": name, "kind": "hard", "frame": 7 + 1000 * number}]


def make(folder: Path, seed: int) -> tuple[list[tuple[Path, Path]], list[Row], list[Row], list[Row]]:
    """Random units: several sources, parts of long ones alone, contents that come twice; and all their rows."""
    random = np.random.default_rng(seed)
    units, every = list[tuple[Path, Path]](), ([], [], [])
    held: tuple[list[Row], list[Row], list[Row]] = ([], [], [])

    def flush() -> None:
        nonlocal held
        if held[0]:
            units.append(write_unit(folder, len(units), *held))
        held = ([], [], [])

    for index in range(40):
        name, content = f"s{index:03d}", f"c{index if random.random() < 0.7 else random.integers(0, 8)}"
        parts = int(random.integers(2, 5)) if random.random() < 0.2 else 1
        for number in range(parts):
            if parts > 1 or random.random() < 0.3:
                flush()
            for into, all_rows, rows in zip(held, every, source_rows(random, name, content, number), strict=True):
                rows = [rows] if isinstance(rows, dict) else rows
                into.extend(rows)
                all_rows.extend(rows)
            if parts > 1:
                flush()
    flush()
    return units, *every


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group", [3, 1 << 14])
def test_units_are_merged_as_one_table(tmp_path, monkeypatch, seed, group):
    monkeypatch.setattr(tables, "ROW_GROUP", group)
    units, sources, clips, cuts = make(tmp_path, seed)
    config = load_preset("paper", {"curation.near_duplicates": False}).curation
    merged = merge_units([m for m, _ in units], [s for _, s in units], tmp_path / "finished", config)
    by_name: dict[str, list[Row]] = {}
    for row in sources:
        by_name.setdefault(row["source_uri"], []).append(row)
    first: dict[str, str] = {}
    for name, rows in by_name.items():
        first.setdefault(rows[0]["source_id"], name)
    usable = {name for name, rows in by_name.items() if any(r["verdict"] == "ok" for r in rows)}
    again = {name for name in usable if first[by_name[name][0]["source_id"]] != name}
    assert again and len(usable) > len(again)

    found = tables.read_sources(tmp_path / "finished")
    assert found["source_uri"].to_list() == list(by_name)
    for row in found.iter_rows(named=True):
        rows = by_name[row["source_uri"]]
        duplicate = row["source_uri"] in again
        assert row["duplicate_of"] == (first[row["source_id"]] if duplicate else None)
        expected = "duplicate" if duplicate else "ok" if row["source_uri"] in usable else rows[0]["verdict"]
        assert row["verdict"] == expected
        assert row["clips"] == (0 if duplicate else sum(r["clips"] for r in rows))
        if len(rows) == 1:
            assert (row["fps"], row["warnings"]) == (25.5, rows[0]["warnings"])
        else:
            assert row["frames"] == sum(r["frames"] for r in rows)

    kept = [row for row in clips if row["source_uri"] not in again]
    table = tables.read_clips(tmp_path / "finished")
    assert table.select("clip_id", "source_uri").rows() == [(r["clip_id"], r["source_uri"]) for r in kept]
    assert table["aesthetics"].to_list() == [pytest.approx(r["motion_score"] + 1) for r in kept]
    assert table.sort("motion_score")["motion_bucket"].is_sorted() and table["motion_bucket"].n_unique() > 10
    assert table["resolution"].to_list() == [min(r["width"], r["height"]) for r in kept]
    assert table["aspect"].to_list() == [pytest.approx(r["width"] / r["height"]) for r in kept]
    shares = dict(found.select("source_uri", "decoded_share").rows())
    assert table["decoded_share"].to_list() == [shares[r["source_uri"]] for r in kept]
    listed = pl.read_parquet(tmp_path / "finished" / "catalogue" / "cuts.parquet")
    assert listed.select("source_uri", "frame").rows() == [(r["source_uri"], r["frame"]) for r in cuts]
    assert len(merged.clips) == len(kept) and len(merged.sources) == len(by_name)


def test_streamed_tables_do_not_depend_on_how_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROW_GROUP", 10)
    schema = pa.schema([("n", pa.int64())])
    whole = pa.table({"n": list(range(57))}, schema=schema)
    for name, sizes in (("a", [57]), ("b", [1] * 57), ("c", [0, 9, 25, 0, 23])):
        ends = np.cumsum(sizes)
        pieces = (whole.slice(int(end - size), size) for end, size in zip(ends, sizes, strict=True))
        tables.write_stream(tmp_path / name, pieces, schema)
    file = pq.ParquetFile(tmp_path / "a")
    assert file.read() == whole
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [10] * 5 + [7]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    tables.write_stream(tmp_path / "none", [], schema)
    assert pq.read_table(tmp_path / "none") == schema.empty_table()
