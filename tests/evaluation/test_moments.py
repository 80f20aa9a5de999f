"""Mergeable moments: one pass, any split, any order and a round trip through a file give the same numbers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.frechet.moments import BLOCKS, Moments, MomentState, load_state, save_state
from svd.core.errors import UserError


def features(seed: int, count: int, dimension: int = 7, offset: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return offset + rng.normal(size=(count, dimension)) @ rng.normal(size=(dimension, dimension))


def assert_same(a: Moments, b: Moments, tolerance: float = 1e-12) -> None:
    scale = max(1.0, float(np.abs(a.scatter()).max()))
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(a.scatter() / scale, b.scatter() / scale, atol=tolerance)
    assert a.quartic == pytest.approx(b.quartic, rel=tolerance)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 60), max_size=6), order=st.randoms())
def test_merge_equals_one_pass_in_any_order(seed: int, cuts: list[int], order) -> None:
    values = features(seed, 60)
    edges = [0, *sorted(cuts), 60]
    parts = [Moments.of(values[a:b]) for a, b in itertools.pairwise(edges)]
    order.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert_same(merged, Moments.of(values))
    np.testing.assert_allclose(merged.scatter() / 59, np.cov(values, rowvar=False), rtol=1e-10)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_merge_is_associative(seed: int) -> None:
    a, b, c = (Moments.of(features(seed + i, 5 + 9 * i)) for i in range(3))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))


def test_far_from_zero_nothing_is_lost() -> None:
    """Raw float64 sums are off by 1e-4 here."""
    values = features(1, 400, offset=0.0) * 0.05
    merged = MomentState.of(values + 1e4).total()
    np.testing.assert_allclose(merged.scatter() / 400, np.cov(values, rowvar=False, bias=True), rtol=1e-8, atol=1e-10)


def test_blocks_split_by_global_number_and_states_merge_by_block() -> None:
    values = features(2, 50)
    whole = MomentState.of(values)
    pieces = MomentState.of(values[30:], range(30, 50)).merge(MomentState.of(values[:30], range(30)))
    for a, b in zip(whole.blocks, pieces.blocks, strict=True):
        assert_same(a, b)
    assert whole.count == 50
    assert [block.count for block in whole.blocks] == [4, 4] + [3] * 14


def test_leave_one_out_is_everything_but_the_block() -> None:
    values = features(3, 70)
    for block, moments in enumerate(MomentState.of(values).leave_one_out()):
        assert_same(moments, Moments.of(values[np.arange(70) % BLOCKS != block]))


def test_window_goes_round() -> None:
    values = features(4, 64)
    chosen = np.isin(np.arange(64) % BLOCKS, [14, 15, 0, 1])
    assert_same(MomentState.of(values).window(14, 4), Moments.of(values[chosen]))


def test_the_root_stays_small() -> None:
    state = MomentState.of(features(5, 3000, 4))
    assert all(len(block.compressed().root) <= 4 for block in state.blocks)
    assert len(state.total().root) <= 4


@pytest.mark.parametrize("count", [3, 40, 700])
def test_file_round_trip(tmp_path: Path, count: int) -> None:
    state = MomentState.of(features(6, count))
    save_state(tmp_path / "a.safetensors", state, {"weights": "none"})
    again = load_state(tmp_path / "a.safetensors")
    for a, b in zip(state.blocks, again.blocks, strict=True):
        assert_same(a, b)
    save_state(tmp_path / "b.safetensors", MomentState.of(features(6, count)), {"weights": "none"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NaN"):
        Moments.of(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="shape"):
        Moments.of(np.zeros(3))
    with pytest.raises(ValueError, match="dimensions"):
        Moments.of(np.ones((2, 3))).merge(Moments.of(np.ones((2, 4))))
    with pytest.raises(ValueError, match="clip numbers"):
        MomentState.of(np.ones((2, 3)), [0])
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a file of feature moments"):
        load_state(tmp_path / "x.safetensors")
