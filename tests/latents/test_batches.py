"""Buckets keep to their budget of tokens and to their shares, and a step's number alone defines its batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from toy_training import FRAMES, PHASE, SIZE, write_cache

from svd.config import Geometry, Phase
from svd.latents.batches import Buckets, IndexedLoader, Order, bucket_seed
from svd.latents.cache import LatentCache
from svd.latents.loader import Batch, Draws, Examples

SIZES = st.builds(
    Geometry, frames=st.integers(1, 25), height=st.integers(1, 9).map(lambda n: 64 * n), width=st.just(576)
)
BUCKETS = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 24)), min_size=1, max_size=4)


def tokens(phase: Phase) -> int:
    return phase.frames * (phase.height // 8) * (phase.width // 8)


@given(own=SIZES, others=st.lists(SIZES, max_size=3), shares=st.integers(1, 60), multiple=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_batches_fill_the_budget_and_never_exceed_it(
    own: Geometry, others: list[Geometry], shares: int, multiple: int
) -> None:
    given = {**PHASE, **own.model_dump(), "batch_size": shares * multiple, "batch_multiple": multiple}
    try:
        phase = Phase.model_validate(given | {"buckets": others})
    except ValidationError as error:
        assert "trained on twice" in str(error) or "have more tokens than" in str(error)
        return
    budget = phase.batch_size * tokens(phase)
    assert [(size.frames, size.height) for size in phase.by_bucket[1:]] == [(g.frames, g.height) for g in others]
    for size in phase.by_bucket:
        assert size.batch_size % multiple == 0 and not size.buckets
        assert size.batch_size * tokens(size) <= budget < (size.batch_size + multiple) * tokens(size)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch_multiple": 3}, "'batch_size' must be a multiple of 'batch_multiple', 3"),
        ({"buckets": [(FRAMES, SIZE, SIZE)]}, "4 frames of 16x16 are trained on twice"),
        ({"buckets": [(2, SIZE, SIZE), (2, SIZE, SIZE)]}, "2 frames of 16x16 are trained on twice"),
        ({"buckets": [(9, 32, SIZE)]}, "1 clips of 9 frames of 32x16 have more tokens than 4 clips of 4 frames"),
    ],
)
def test_buckets_that_make_no_sense_are_refused(changed: dict[str, Any], said: str) -> None:
    names = ("frames", "height", "width")
    if "buckets" in changed:
        changed = {"buckets": [dict(zip(names, size, strict=True)) for size in changed["buckets"]]}
    with pytest.raises(ValidationError, match=said):
        Phase.model_validate(PHASE | changed)


@given(buckets=BUCKETS, seed=st.integers(0, 9), epochs=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_every_epoch_has_each_bucket_in_its_share_and_every_batch_once(
    buckets: list[tuple[int, int]], seed: int, epochs: int
) -> None:
    samples, sizes = zip(*buckets, strict=True)
    order = Order(samples, sizes, seed)
    wanted = [epochs * count // size for count, size in buckets]
    drawn: list[list[int]] = [[] for _ in buckets]
    for bucket, number in map(order.at, range(sum(wanted))):
        drawn[bucket].append(number)
    assert [sorted(numbers) for numbers in drawn] == [list(range(count)) for count in wanted]


def test_buckets_are_mixed_within_an_epoch_and_far_steps_cost_nothing() -> None:
    order = Order([10_000, 30_000], [10, 10], 3)
    kinds = [order.at(step)[0] for step in range(1000)]
    assert sum(kinds) / 1000 == pytest.approx(0.75, abs=0.04)
    assert 0.3 < sum(a != b for a, b in itertools.pairwise(kinds)) / 1000 < 0.45  # 2 x 0.75 x 0.25
    assert order.at(10**12)[1] // 10**11 in (2, 7)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Buckets:
    """Clips of 4, 2 and 1 frames, in batches of 4, 8 and 16."""
    cache = LatentCache(write_cache(tmp_path_factory.mktemp("cache")))
    return Buckets([bucket(cache, k, frames) for k, frames in enumerate((4, 2, 1))], [4, 8, 16], 7)


def bucket(cache: LatentCache, number: int, frames: int) -> Examples:
    return Examples(cache, cache.index.rows, frames, Draws(bucket_seed(7, number), -1.2, 1.0, text_dropout=0.15))


def numbers(batches: list[Batch]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


def test_a_batch_has_one_length_and_all_lengths_come(data: Buckets) -> None:
    shapes = {tuple(batch["latents"].shape[:2]) for batch in IndexedLoader(data, 12)}
    assert shapes == {(4, 4), (8, 2), (16, 1)}


@pytest.mark.parametrize(("ranks", "parts"), [(2, 1), (1, 4), (2, 2)])
def test_ranks_and_parts_share_the_same_steps(data: Buckets, ranks: int, parts: int) -> None:
    whole = numbers(list(IndexedLoader(data, 6)))
    shared = [numbers(list(IndexedLoader(data, 6, parts, rank, ranks))) for rank in range(ranks)]
    for step, wanted in enumerate(whole):
        found = [batches[step * parts : (step + 1) * parts] for batches in shared]
        assert len({tuple(map(len, batches)) for batches in found}) == 1
        assert sorted(index for batches in found for batch in batches for index in batch) == wanted


def test_a_restart_at_any_step_goes_on_with_the_same_samples(data: Buckets) -> None:
    whole = list(IndexedLoader(data, 6))
    for step in range(1, 6):
        again = IndexedLoader(data, 6)
        again.load_state_dict({"next": step})
        first = next(iter(again))
        assert first.keys() == whole[step].keys()
        assert all(value.equal(whole[step][name]) for name, value in first.items())


def test_a_sample_of_all_is_that_of_its_bucket(data: Buckets) -> None:
    assert data[3 * 5 + 1]["latents"].equal(data.examples[1][5]["latents"])
    assert data[16]["index"] == 16 and data.sources(16) == data.examples[1].sources(5)
    assert not data[3 * 5]["sigma"].equal(data[3 * 5 + 1]["sigma"])


def test_one_bucket_is_drawn_as_without_buckets(data: Buckets) -> None:
    alone = Buckets(data.examples[:1], [4], 7)
    assert numbers(list(IndexedLoader(alone, 3))) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
