"""The rows of an index are those of its Parquet file, in memory or mapped, in the order that trainings draw from."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_training import FRAMES, write_cache

from svd.config import Phase, Subset
from svd.core.errors import UserError
from svd.latents import columns, index
from svd.latents.batches import Buckets, IndexedLoader
from svd.latents.cache import SCHEMA, LatentCache, write_index
from svd.latents.index import OpenedIndex
from svd.latents.loader import Draws, Examples
from svd.training.stages import select_subset


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SVD_CACHE", str(tmp_path / "of this machine"))
    return tmp_path / "of this machine"


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Map indexes of any size, in many small batches."""
    monkeypatch.setattr(index, "IN_MEMORY", 0)
    monkeypatch.setattr(columns, "BATCH", 7)


def parquet(folder: Path, count: int) -> Path:
    """Write an index of `count` rows, a tenth of them for testing."""
    rows = [
        {
            "sample_id": f"{n * 7919 % count:06}",
            "clip_id": f"clip-{n // 2}",
            "geometry": "14x320x576" if n % 3 else "25x320x576",
            "split": "train" if n % 10 else "test",
            "motion_score": n * 31 % 100 / 100,
            "camera": "static" if n % 4 else "pan-left",
            "shard": f"shard-{n // 64}",
            "row": n % 64,
            "captions": [{"captioner": "coca", "text": f"text {n}", "row": n}],
        }
        for n in range(count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_index(folder, rows, {}, torch.zeros(1, 1))
    return folder / "index.parquet"


def expected(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file by sample id, without the texts of captions."""
    rows = pl.read_parquet(path).sort("sample_id", maintain_order=True).to_dicts()
    for row in rows:
        for caption in row["captions"] or []:
            del caption["text"]
    return rows


words = st.one_of(st.none(), st.text("ab-é ", max_size=5))
scores = st.one_of(st.none(), st.floats(allow_nan=False))
captions = st.fixed_dictionaries({"captioner": words, "text": words, "row": st.integers(0, 2**31 - 1)})
any_rows = st.lists(
    st.fixed_dictionaries(
        {
            "sample_id": st.text("0aé", max_size=4),
            "clip_id": words,
            "geometry": st.sampled_from(["14x320x576", "25x320x576", "14x64x64"]),
            "split": st.sampled_from(["train", "test"]),
            "fps": scores,
            "motion_bucket": st.one_of(st.none(), st.integers(0, 255)),
            "motion_score": scores,
            "similarity": scores,
            "text_area": scores,
            "camera": words,
            "elevation": scores,
            "shard": words,
            "row": st.integers(0, 2**31 - 1),
            "captions": st.one_of(st.none(), st.lists(captions, max_size=3)),
        }
    ),
    max_size=30,
    unique_by=lambda row: row["sample_id"],
)
PHASE = Phase(iterations=1, batch_size=1, frames=14, height=320, width=576, p_mean=0, p_std=1, learning_rate=1)


@pytest.mark.usefixtures("mapped")
@pytest.mark.parametrize("in_memory", [0, 1 << 17])
@given(rows=any_rows, share=st.sampled_from([0.0, 0.3, 0.5]))
@settings(max_examples=25, deadline=None)
def test_rows_and_selections_are_those_of_the_parquet_file(
    in_memory: int, rows: list[dict[str, Any]], share: float
) -> None:
    """The selection beside it is the one that trainings made when the whole index was a data frame."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "IN_MEMORY", in_memory)
        patch.setenv("SVD_CACHE", folder)
        path = Path(folder) / "index.parquet"
        pl.DataFrame(rows, schema=SCHEMA).write_parquet(path)
        every = expected(path)
        opened = OpenedIndex(path)
        assert list(opened.rows) == every and (opened.folder is None) == (len(rows) <= in_memory)
        assert opened.values("shard") == sorted({row["shard"] for row in rows} - {None})
        known = pl.DataFrame(rows, schema=SCHEMA).filter(
            (pl.col("geometry") == "14x320x576") & (pl.col("split") == "train")
        )
        chosen = opened.rows.where((pl.col("geometry") == "14x320x576") & (pl.col("split") == "train"))
        known = known.sort("sample_id")
        if share:
            known = known.filter(pl.col("motion_score") >= known["motion_score"].quantile(share, "lower"))
        chosen = select_subset(chosen, Subset(min_motion=share))
        assert [row["sample_id"] for row in chosen] == known["sample_id"].to_list()
        assert [row["sample_id"] for row in chosen[1::2]] == known["sample_id"].to_list()[1::2]


def opened_together(path: Path, gate: Any, answers: Any) -> None:
    index.IN_MEMORY = 0
    gate.wait(60)
    opened = OpenedIndex(path)
    assert opened.folder is not None
    answers.put(((opened.folder / columns.ROWS).stat().st_ino, list(opened.rows)))


def test_processes_that_open_an_index_at_once_share_one_copy(tmp_path: Path, cache_folder: Path) -> None:
    path = parquet(tmp_path, 500)
    spawn = multiprocessing.get_context("fork")
    gate, answers = spawn.Barrier(4), spawn.SimpleQueue()
    processes = [spawn.Process(target=opened_together, args=(path, gate, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join(60)
    assert {inode for inode, _ in found} == {next(cache_folder.rglob(columns.ROWS)).stat().st_ino}
    assert all(rows == expected(path) for _, rows in found)
    (copy,) = (cache_folder / "indexes").iterdir()
    assert sorted(os.listdir(copy)) == [columns.ORDER, columns.ROWS]


@pytest.mark.usefixtures("mapped")
def test_what_is_sent_to_a_worker_does_not_grow(tmp_path: Path) -> None:
    sizes = []
    for count in (100, 10_000):
        path = parquet(tmp_path / str(count), count)
        cache = LatentCache(path.parent)
        examples = Examples(cache, cache.rows(PHASE, "train"), 14, Draws(0, 0.0, 1.0))
        sent = pickle.dumps(examples)
        sizes.append(len(sent))
        assert list(pickle.loads(sent).rows) == list(examples.rows)
    assert abs(sizes[0] - sizes[1]) < 64 and max(sizes) < 4000


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "toy")


def batches(folder: Path, workers: int) -> Iterator[dict[str, torch.Tensor]]:
    cache = LatentCache(folder)
    examples = Examples(cache, cache.index.rows, FRAMES, Draws(7, -1.2, 1.0, text_dropout=0.15))
    yield from IndexedLoader(Buckets([examples], [4], 7), 5, num_workers=workers)


def test_workers_draw_the_same_from_a_mapped_index(toy: Path, request: pytest.FixtureRequest) -> None:
    known = list(batches(toy, 0))
    request.getfixturevalue("mapped")
    for batch, other in zip(known, batches(toy, 2), strict=True):
        assert all(value.equal(other[name]) for name, value in batch.items())


@pytest.mark.usefixtures("mapped")
def test_another_index_at_the_same_place_is_another(tmp_path: Path) -> None:
    sent = pickle.dumps(OpenedIndex(parquet(tmp_path, 30)))
    assert len(OpenedIndex(parquet(tmp_path, 40))) == 40
    with pytest.raises(UserError, match=r"index.parquet: changed while it was used; start the command again"):
        pickle.loads(sent)


@pytest.mark.usefixtures("mapped")
def test_a_damaged_index_is_told_in_one_line(tmp_path: Path, cache_folder: Path) -> None:
    path = parquet(tmp_path, 300)
    whole = path.read_bytes()
    path.write_bytes(whole[:50] + bytes(200) + whole[250:])
    with pytest.raises(UserError, match=r"the latent cache is damaged .*run the stage 'latents' again") as error:
        LatentCache(tmp_path)
    assert "\n" not in str(error.value)
    assert not list(cache_folder.rglob(columns.ROWS)) and not list(cache_folder.rglob("*.tmp"))


@pytest.mark.usefixtures("mapped")
def test_a_folder_that_cannot_hold_the_copy_is_named(tmp_path: Path, cache_folder: Path) -> None:
    path = parquet(tmp_path, 30)
    cache_folder.write_text("a file")
    with pytest.raises(UserError, match=r"of this machine/indexes: .* set SVD_CACHE to a folder"):
        LatentCache(path.parent)


@pytest.mark.usefixtures("mapped")
def test_a_disk_that_is_full_is_no_damaged_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path, 30)

    def full(*_: object) -> None:
        raise OSError("20000 requested and 10208 written")  # NumPy's words; without an errno

    monkeypatch.setattr(columns.np, "save", full)
    with pytest.raises(UserError, match=r"no memory-mapped copy .*10208 written.* set SVD_CACHE to a folder"):
        LatentCache(path.parent)


@pytest.mark.usefixtures("mapped")
@pytest.mark.parametrize("name", [columns.ROWS, columns.ORDER])
def test_a_copy_whose_removal_was_killed_is_made_again(name: str, tmp_path: Path) -> None:
    path = parquet(tmp_path, 30)
    folder = OpenedIndex(path).folder
    assert folder is not None
    (folder / name).unlink()
    assert len(LatentCache(tmp_path).index) == 30
    assert len(list(folder.parent.iterdir())) == 1


@pytest.mark.usefixtures("mapped")
def test_copies_that_nobody_opens_any_more_are_removed(tmp_path: Path) -> None:
    old, used = (OpenedIndex(parquet(tmp_path / name, 30)).folder for name in ("old", "used"))
    assert old is not None and used is not None
    for folder in (old, used):
        os.utime(folder / columns.ROWS, (time.time() - 40 * 86400,) * 2)
    OpenedIndex(tmp_path / "used" / "index.parquet")
    OpenedIndex(parquet(tmp_path / "new", 30))
    assert used.is_dir() and not old.exists()
