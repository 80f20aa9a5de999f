"""Samples read from a store are those of a disk, no shard is read whole, and a store that is away is no damage."""

from __future__ import annotations

import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_training import FRAMES, write_cache

from svd import storage
from svd.core.files import write_json
from svd.core.retries import Unreachable
from svd.latents import streaming
from svd.latents.batches import Buckets, IndexedLoader
from svd.latents.cache import DamagedSample, LatentCache
from svd.latents.loader import Draws, Examples
from svd.stage import STREAMED

SHARD = "toy.safetensors"


@pytest.fixture
def caches(tmp_path: Path) -> tuple[LatentCache, LatentCache]:
    """A whole cache, and one whose shard lies in a store."""
    whole = write_cache(tmp_path / "whole")
    return LatentCache(whole), LatentCache(streamed(whole, tmp_path))


def streamed(whole: Path, folder: Path) -> Path:
    part, store = folder / "part", folder / "store"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("shards"))
    store.mkdir()
    shutil.copy(whole / "shards" / SHARD, store / "object")
    write_json(part / STREAMED, {f"shards/{SHARD}": str(store / "object")})
    return part


def batches(cache: LatentCache, workers: int = 0) -> list[dict[str, object]]:
    examples = Examples(cache, cache.index.rows, FRAMES, Draws(7, -1.2, 1.0, text_dropout=0.15))
    return list(IndexedLoader(Buckets([examples], [4], 7), 4, num_workers=workers))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_streamed_sample_is_that_of_the_disk(caches: tuple[LatentCache, LatentCache], workers: int) -> None:
    expected, found = batches(caches[0]), batches(caches[1], workers)
    assert len(expected) == len(found) == 4
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_no_more_is_read_than_the_sample(
    caches: tuple[LatentCache, LatentCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cache = caches
    row, lengths = cache.index.rows[0], list[int]()
    opened = storage.ranges

    def counted(location: str) -> tuple[Callable[[int, int], bytes], int]:
        read, size = opened(location)
        return lambda start, length: lengths.append(length) or read(start, length), size

    monkeypatch.setattr(storage, "ranges", counted)
    cache.read(row)
    with open(whole.folder / "shards" / SHARD, "rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    sample = whole.read(row)
    halves = sample.moments.numel() + sample.image.numel() + sum(text.numel() for _, text in sample.texts)
    assert sum(lengths[1:]) == 2 * halves + sample.frame.numel()
    assert lengths[0] == streaming.FIRST > header
    lengths.clear()
    pickle.loads(pickle.dumps(cache)).read(row)
    assert len(lengths) == 1 + 3 + len(sample.texts), "a worker opens the shard anew, once"


def test_the_samples_of_a_batch_are_read_at_once(
    caches: tuple[LatentCache, LatentCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, together = caches[1], threading.Barrier(4)
    original = LatentCache.read

    def read(self: LatentCache, row: object) -> object:
        together.wait(timeout=20)  # broken unless four threads are here
        return original(self, row)

    monkeypatch.setattr(LatentCache, "read", read)
    assert len(batches(cache)) == 4


@pytest.mark.parametrize("header", [b"", b"short", (10**9).to_bytes(8, "little") + b"{}", None])
def test_a_damaged_object_costs_its_samples_alone(
    caches: tuple[LatentCache, LatentCache], header: bytes | None
) -> None:
    cache = caches[1]
    location = Path(streaming.streamed_shards(cache.folder)[SHARD])
    location.write_bytes(location.read_bytes()[:-1] if header is None else header)
    with pytest.raises(DamagedSample, match="can't be read"):
        cache.read(cache.index.rows[0])


def test_a_missing_object_is_damage_and_a_lost_store_is_not(
    caches: tuple[LatentCache, LatentCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = caches[1]
    Path(streaming.streamed_shards(cache.folder)[SHARD]).unlink()
    with pytest.raises(DamagedSample):
        cache.read(cache.index.rows[0])

    def away(location: str) -> None:
        raise Unreachable(f"{location}: no answer")

    monkeypatch.setattr(storage, "ranges", away)
    with pytest.raises(Unreachable):
        cache.read(cache.index.rows[0])


def test_a_cache_without_a_listing_is_read_here(caches: tuple[LatentCache, LatentCache]) -> None:
    assert streaming.streamed_shards(caches[0].folder) == {}
    assert caches[0].each(lambda index: threading.get_ident(), [0, 1]) == [threading.get_ident()] * 2
