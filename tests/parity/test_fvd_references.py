"""The distances against SciPy's matrix square root and scikit-learn's polynomial kernel."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from gaussians import frechet_of_gaussians
from sklearn.metrics.pairwise import polynomial_kernel

from evaluation.frechet.distances import frechet, kernel_distance
from evaluation.frechet.moments import Moments, MomentState


def sample(seed: int, count: int, dimension: int, decay: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(dimension, dimension)))[0]
    scales = np.arange(1, dimension + 1) ** (-decay / 2)
    return (rng.normal(size=(count, dimension)) * scales) @ rotation


@pytest.mark.parametrize(("count", "decay"), [(2000, 0.0), (2000, 0.8), (400, 0.8)])
@pytest.mark.parametrize("ddof", [0, 1])
def test_frechet_equals_scipy_where_scipy_is_exact(count: int, decay: float, ddof: int) -> None:
    x, y = sample(0, count, 64, decay), sample(1, count, 64, decay) * 1.3 + 0.2
    s1, s2 = np.cov(x, rowvar=False, ddof=ddof), np.cov(y, rowvar=False, ddof=ddof)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    difference = x.mean(0) - y.mean(0)
    expected = difference @ difference + np.trace(s1 + s2 - 2 * root)
    assert frechet(Moments.of(x), Moments.of(y), ddof).value == pytest.approx(expected, rel=1e-8)
    assert frechet_of_gaussians(x.mean(0), s1, y.mean(0), s2).value == pytest.approx(expected, rel=1e-8)


def test_known_gaussians() -> None:
    """Commuting covariances: Σ (σ₁ − σ₂)², plus the squared distance of the means, in a rotated frame."""
    rng = np.random.default_rng(3)
    rotation = np.linalg.qr(rng.normal(size=(50, 50)))[0]
    a, b = rng.uniform(0.1, 3, 50), rng.uniform(0.1, 3, 50)
    means = rng.normal(size=(2, 50))
    sets = [Moments(9, mean, 3 * (rotation * spread).T, 0.0) for mean, spread in zip(means, (a, b), strict=True)]
    found = frechet(*sets)
    assert found.value == pytest.approx(((means[0] - means[1]) ** 2).sum() + ((a - b) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("decay", [2.0, 4.0])
def test_steep_spectra_where_sqrtm_loses_four_digits(decay: float) -> None:
    """The exact value of a set against a scaled copy of itself is known: (s − 1)² tr Σ."""
    x = sample(5, 256, 400, decay)
    x -= x.mean(0)
    exact = 0.25 * np.cov(x, rowvar=False, ddof=0).trace()
    assert frechet(Moments.of(x), Moments.of(1.5 * x)).value == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("counts", [(60, 80), (500, 300)])
def test_kernel_distance_equals_kernel_matrices(counts: tuple[int, int]) -> None:
    x, y = sample(7, counts[0], 96, 0.8) + 0.5, sample(8, counts[1], 96, 0.8) * 1.2 + 0.4
    kernel = {"degree": 2, "gamma": 1 / 96, "coef0": 0}
    xx, yy, xy = (polynomial_kernel(*pair, **kernel) for pair in ((x, x), (y, y), (x, y)))
    found = kernel_distance(MomentState.of(x).total(), MomentState.of(y).total())
    assert found.biased == pytest.approx(xx.mean() + yy.mean() - 2 * xy.mean(), rel=1e-9)
    n, m = counts
    off = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean()
    assert found.unbiased == pytest.approx(off, rel=1e-9)
