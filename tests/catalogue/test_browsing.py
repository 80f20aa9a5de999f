"""What the browser page says of a catalogue is what `filters` say of it: counts, verdicts, orders, searches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from svd.catalogue import axes, filters, schema, tables
from svd.catalogue.browser.app import PAGE, create_app
from svd.catalogue.browser.index import SORTABLE, ClipIndex
from svd.config import FiltersConfig

COLUMNS = {axis.name: axis.column for axis in axes.AXES}
WORDS = ("red", "Blue", "dog", "man", "runs", "ÜBER")


def write_random(folder: Path, seed: int, count: int = 200, rows: int = 16) -> Path:
    """A catalogue whose scores tie, are missing, or are not a number; axes without a score; `rows` a row group."""
    random = np.random.default_rng(seed)
    columns = {}
    for name in COLUMNS.values():
        values = random.integers(0, 12, count) / np.float32(7)
        values[random.random(count) < 0.1] = np.nan
        missing = random.random(count) < random.choice([0.0, 0.2, 1.0])
        columns[name] = [None if gone else float(value) for gone, value in zip(missing, values, strict=True)]
    sources = np.sort(random.integers(0, count // 5, count))
    frame = pl.DataFrame(
        {
            "clip_id": [f"{seed}-{number}" for number in random.permutation(count)],
            "source_uri": [f"train/{source:03d}.mp4" for source in sources],
            "start_frame": np.arange(count),
            "duration": random.integers(1, 5, count) / 2,
            "camera": random.choice([*WORDS, ""], count),
            "captions": [[{"captioner": "a", "text": " ".join(random.choice(WORDS, 2))}] for _ in range(count)],
            **columns,
        },
        schema_overrides={name: pl.Float32 for name in columns},
    )
    (folder / "catalogue").mkdir(parents=True)
    table = tables.with_schema(frame, schema.SCORES_SCHEMA)
    pq.write_table(table, folder / "catalogue" / "clips.parquet", row_group_size=rows)
    filters.write_verdicts(folder, FiltersConfig())
    return folder


def random_thresholds(clips: pl.DataFrame, seed: int) -> dict[str, float]:
    """A few axes, each with a threshold that is a score of a clip, or none of them."""
    random = np.random.default_rng(seed)
    names = random.choice(list(COLUMNS), random.integers(0, len(COLUMNS) + 1), replace=False)
    values = {name: clips[COLUMNS[name]].drop_nulls().drop_nans() for name in names}
    return {
        str(name): float(random.choice(scores.to_numpy())) if len(scores) and random.random() < 0.7 else random.random()
        for name, scores in values.items()
    }


def judged(clips: pl.DataFrame, thresholds: dict[str, float]) -> pl.DataFrame:
    options = {axis.name: axis.option for axis in axes.AXES}
    config = {options[name]: {"absolute": value} for name, value in thresholds.items()}
    return filters.apply(clips.lazy(), FiltersConfig.model_validate(config))[0].collect()


@pytest.mark.parametrize("seed", range(12))
def test_the_answer_to_a_drag_is_the_verdict_of_the_filters(tmp_path, seed):
    folder = write_random(tmp_path / "out", seed)
    clips, client = tables.read_clips(folder), TestClient(create_app(folder), base_url="http://127.0.0.1")
    for number in range(5):
        thresholds = random_thresholds(clips, 100 * seed + number)
        truth = judged(clips, thresholds)
        answer = client.post("/api/counts", json={"thresholds": thresholds}).json()
        assert answer["kept"] == truth["keep"].sum() == (truth["verdict"] == "kept").sum()
        assert answer["kept"] + answer["dropped"] == len(clips)
        used = [name for name in thresholds if clips[COLUMNS[name]].count()]
        assert answer["axes"] == {name: {"drops": (~truth[f"pass_{name}"]).sum()} for name in used}


@pytest.mark.parametrize("seed", range(6))
def test_pages_hold_the_clips_and_verdicts_of_the_whole_catalogue(tmp_path, seed):
    folder, random = write_random(tmp_path / "out", seed), np.random.default_rng(seed)
    clips, client = tables.read_clips(folder), TestClient(create_app(folder), base_url="http://127.0.0.1")
    for column in SORTABLE:
        thresholds, descending = random_thresholds(clips, seed), bool(random.integers(2))
        show, search = (
            str(random.choice(["all", "kept", "dropped"])),
            str(random.choice(["", "RED", "über b", "03.mp"])),
        )
        truth = judged(clips, thresholds)
        if show != "all":
            truth = truth.filter(pl.col("keep") == (show == "kept"))
        text = pl.format("{} {} {}", "source_uri", "camera", pl.col("captions").list[0].struct.field("text"))
        truth = truth.filter(text.str.to_lowercase().str.contains(search.lower(), literal=True))
        truth = truth.sort(column, "source_uri", "start_frame", descending=[descending, False, False], nulls_last=True)
        query = {"thresholds": thresholds, "sort": column, "descending": descending, "show": show, "search": search}
        offset, seen = 0, list[dict]()
        while page := client.post("/api/clips", json={**query, "offset": offset}).json():
            seen, offset = seen + page["clips"], offset + PAGE
            if offset >= page["matching"]:
                break
        assert page["matching"] == len(truth) == len(seen)
        for name in ("clip_id", "verdict", "reason", "keep", "captions", "source_uri"):
            assert [clip[name] for clip in seen] == truth[name].to_list(), (name, query)


def test_clips_are_found_by_their_ids_and_rows_kept_in_memory_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("svd.catalogue.browser.index.CACHED_ROWS", 10)
    folder = write_random(tmp_path / "out", 1)
    table, clips = tables.read_clips(folder), ClipIndex(folder)
    for name, start in table.select("clip_id", "captions").rows():
        found = clips.find(name)
        assert found is not None and found["captions"] == start
        assert len(clips._rows) <= 10
    assert clips.find("1-200") is None
    assert [row["clip_id"] for row in clips.rows([199, 3, 3, 0])] == [table["clip_id"][n] for n in (199, 3, 3, 0)]


def test_a_catalogue_that_is_replaced_is_not_mixed_with_the_one_that_is_shown(tmp_path):
    folder, other = write_random(tmp_path / "out", 1), write_random(tmp_path / "other", 2)
    expected, clips = tables.read_clips(folder)["clip_id"].to_list(), ClipIndex(folder)
    (other / "catalogue" / "clips.parquet").replace(folder / "catalogue" / "clips.parquet")
    assert [row["clip_id"] for row in clips.rows(range(200))] == expected


def test_a_catalogue_without_clips_is_shown(tmp_path):
    folder = write_random(tmp_path / "out", 0)
    tables.write_table(folder / "catalogue" / "clips.parquet", schema.SCORES_SCHEMA.empty_table())
    filters.write_verdicts(folder, FiltersConfig())
    client = TestClient(create_app(folder), base_url="http://127.0.0.1")
    assert client.get("/").status_code == 200
    for query in ({}, {"search": "x"}, {"thresholds": {"motion": 1.0}, "show": "kept", "sort": "motion_score"}):
        answer = client.post("/api/clips", json=query)
        assert answer.json() == {"kept": 0, "dropped": 0, "axes": {}, "matching": 0, "clips": []}
