"""Distances: closed forms, invariances, error bars that are right, and guards."""

from __future__ import annotations

import math

import numpy as np
import pytest
from gaussians import frechet_of_gaussians
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.frechet.distances import distance, frechet, jackknife, kernel_distance
from evaluation.frechet.moments import Moments, MomentState


def normal(seed: int, count: int, dimension: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return shift + scale * np.random.default_rng(seed).normal(size=(count, dimension))


def test_closed_form_of_diagonal_gaussians() -> None:
    """Moments of exactly known Gaussians: 2 n points at ± √(n σ²) along each axis have the covariance diag(σ²)."""

    def of(mean: np.ndarray, variances: np.ndarray) -> Moments:
        steps = np.diag(np.sqrt(len(variances) * variances))
        return Moments.of(mean + np.concatenate([steps, -steps]))

    spread_1, spread_2 = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.25])
    found = frechet(of(np.zeros(3), spread_1), of(np.array([1.0, 2.0, 2.0]), spread_2))
    assert found.mean_term == pytest.approx(9.0)
    assert found.covariance_term == pytest.approx(float(((np.sqrt(spread_1) - np.sqrt(spread_2)) ** 2).sum()))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), counts=st.tuples(st.integers(3, 40), st.integers(3, 40)), ddof=st.integers(0, 1))
def test_roots_agree_with_covariances(seed: int, counts: tuple[int, int], ddof: int) -> None:
    x, y = normal(seed, counts[0], 9), normal(seed + 1, counts[1], 9, 0.5, 2.0)
    one = frechet(Moments.of(x), Moments.of(y), ddof)
    covariances = [np.cov(values, rowvar=False, ddof=ddof) for values in (x, y)]
    other = frechet_of_gaussians(x.mean(0), covariances[0], y.mean(0), covariances[1])
    assert one.value == pytest.approx(other.value, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("count", [12, 60, 500])
def test_identical_sets_have_no_distance(count: int) -> None:
    x = Moments.of(normal(0, count, 40, 2.0))
    assert abs(frechet(x, x).value) < 1e-9
    assert abs(kernel_distance(x, x).biased) < 1e-9


def test_rotation_order_and_side_do_not_matter() -> None:
    x, y = normal(1, 90, 12), normal(2, 110, 12, 0.3)
    rotation = np.linalg.qr(normal(3, 12, 12))[0]
    value = frechet(Moments.of(x), Moments.of(y)).value
    assert frechet(Moments.of(x @ rotation), Moments.of(y @ rotation)).value == pytest.approx(value, rel=1e-10)
    assert frechet(Moments.of(y), Moments.of(x)).value == pytest.approx(value, rel=1e-10)
    assert frechet(Moments.of(x[::-1]), Moments.of(y[::-1])).value == pytest.approx(value, rel=1e-10)


def test_the_terms_tell_a_shift_from_a_spread() -> None:
    x = normal(4, 4000, 5)
    shifted = frechet(Moments.of(x), Moments.of(x + 2.0))
    assert shifted.mean_term == pytest.approx(20.0, rel=1e-9) and abs(shifted.covariance_term) < 1e-9
    wider = frechet(Moments.of(x), Moments.of((x - x.mean(0)) * 3 + x.mean(0)))
    assert abs(wider.mean_term) < 1e-12 and wider.covariance_term == pytest.approx(4 * x.var(0).sum(), rel=1e-9)


def test_ddof_is_what_it_says() -> None:
    x, y = normal(5, 20, 3), normal(6, 20, 3, 0.0, 2.0)
    biased, unbiased = (frechet(Moments.of(x), Moments.of(y), ddof).covariance_term for ddof in (0, 1))
    assert unbiased == pytest.approx(biased * 20 / 19, rel=1e-10)


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = normal(7, 16, 1)[:, 0]
    replicates = [float(np.delete(values, i).mean()) for i in range(16)]
    error, corrected = jackknife(float(values.mean()), replicates)
    assert error == pytest.approx(values.std(ddof=1) / 4)
    assert corrected == pytest.approx(values.mean())


def test_error_bar_covers_the_sampling_spread_and_the_bias_is_removed() -> None:
    """Sets from one distribution: the truth is 0, the plain value is 1/N bias."""
    found = [
        distance(MomentState.of(normal(2 * i, 320, 24)), MomentState.of(normal(2 * i + 1, 320, 24))) for i in range(24)
    ]
    plain = np.array([d.frechet.value for d in found])
    assert plain.min() > 0.1
    assert abs(np.mean([d.bias_corrected for d in found])) < 0.25 * plain.mean()
    assert abs(np.mean([d.infinity for d in found])) < 0.35 * plain.mean()
    assert 0.5 < np.mean([d.standard_error for d in found]) / plain.std(ddof=1) < 2.0
    kernels = np.array([d.kernel.unbiased for d in found])
    assert abs(kernels.mean()) < 3 * kernels.std(ddof=1) / math.sqrt(len(kernels))
    assert all(d.kernel.biased > d.kernel.unbiased for d in found)


def test_error_bar_holds_for_real_clips_that_come_in_groups() -> None:
    """UCF-101 cuts about five clips out of a video. Blocks that split such groups give bars a fifth too small."""

    def real(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return np.repeat(rng.normal(size=(64, 16)), 5, axis=0) + 0.5 * rng.normal(size=(320, 16))

    groups = np.repeat(np.arange(64), 5)
    made = [MomentState.of(normal(1000 + i, 320, 16, 0.3)) for i in range(60)]
    together = [distance(MomentState.of(real(i), groups), made[i]) for i in range(60)]
    split = [distance(MomentState.of(real(i)), made[i]).standard_error for i in range(60)]
    true = np.std([d.frechet.value for d in together], ddof=1)
    found = np.mean([d.standard_error for d in together])
    assert np.mean(split) < 0.85 * true < found < 1.35 * true


def test_infinity_is_not_given_for_a_handful_of_clips() -> None:
    assert math.isnan(distance(MomentState.of(normal(0, 40, 4)), MomentState.of(normal(1, 40, 4))).infinity)


def test_warnings_name_rank_and_unequal_numbers() -> None:
    few = distance(MomentState.of(normal(0, 40, 64)), MomentState.of(normal(1, 60, 64))).warnings
    assert sum("full rank" in text for text in few) == 2
    assert any("40 real against 60 generated" in text for text in few)
    assert not distance(MomentState.of(normal(0, 200, 8)), MomentState.of(normal(1, 200, 8))).warnings


def test_unusable_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="dimensions"):
        frechet(Moments.of(normal(0, 9, 3)), Moments.of(normal(0, 9, 4)))
    with pytest.raises(ValueError, match="too few"):
        frechet(Moments.of(normal(0, 1, 3)), Moments.of(normal(0, 9, 3)), ddof=1)
    with pytest.raises(ValueError, match="blocks"):
        distance(MomentState.of(normal(0, 2, 3)), MomentState.of(normal(1, 2, 3)))
