"""Distances between two sets of clips, from the moments of their features (App. E.4).

Fréchet distance with an error bar, and a kernel distance. A Fréchet distance is called `fvd` only with the Kinetics-400
I3D (`features.metric_name`); the formulas serve any features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from evaluation.frechet.moments import BLOCKS, Array, Moments, MomentState
from evaluation.frechet.protocol import ScoreError


@dataclass(frozen=True)
class Frechet:
    """The terms of a Fréchet distance: ‖μ₁−μ₂‖², and Tr(Σ₁+Σ₂−2(Σ₁Σ₂)^½) for the difference in spread."""

    mean_term: float
    covariance_term: float

    @property
    def value(self) -> float:
        """The distance; already squared, as it is published."""
        return self.mean_term + self.covariance_term


@dataclass(frozen=True)
class Kernel:
    """Maximum mean discrepancy (squared): biased V-statistic and unbiased U-statistic.

    The kernel (x·y/d)² is that of JEDi (Luo et al. 2024, "Beyond FVD"), who publish the biased value times 100.
    """

    biased: float
    unbiased: float


@dataclass(frozen=True)
class Distance:
    """All distances of two sets, with their error bars.

    replicates, kernel_replicates: values with one block left out, for paired comparisons.
    """

    frechet: Frechet
    standard_error: float
    bias_corrected: float
    infinity: float
    kernel: Kernel
    kernel_standard_error: float
    real: int
    generated: int
    replicates: tuple[float, ...]
    kernel_replicates: tuple[float, ...]
    warnings: tuple[str, ...]


def _nuclear_norm(matrix: Array) -> float:
    return float(np.linalg.svd(matrix, compute_uv=False).sum()) if matrix.size else 0.0


def frechet(real: Moments, generated: Moments, ddof: int = 0) -> Frechet:
    """Return the Fréchet distance of two sets, from the roots of their scatter matrices.

    Covariances divide by n − ddof.

    tr (Σ₁Σ₂)^½ = ‖A Bᵀ‖_* for any roots AᵀA = Σ₁, BᵀB = Σ₂: no complex branch, and never below zero beyond 1e-12,
    unlike `scipy.linalg.sqrtm(Σ₁Σ₂)`, which is off by 1e-4 for steep spectra.
    Raises ScoreError for too few clips or different feature sizes.
    """
    _check(real, generated, ddof)
    a = real.root / math.sqrt(real.count - ddof)
    b = generated.root / math.sqrt(generated.count - ddof)
    difference = real.mean - generated.mean
    spread = float((a**2).sum() + (b**2).sum() - 2.0 * _nuclear_norm(a @ b.T))
    return Frechet(float(difference @ difference), spread)


def _check(real: Moments, generated: Moments, ddof: int) -> None:
    if real.dimension != generated.dimension:
        raise ScoreError(f"features of {real.dimension} and {generated.dimension} dimensions can't be compared")
    if min(real.count, generated.count) <= ddof:
        raise ScoreError(f"{real.count} real and {generated.count} generated clips are too few (ddof {ddof})")


def kernel_distance(real: Moments, generated: Moments) -> Kernel:
    """Return the MMD² of the kernel (x·y/d)², exactly, from second moments: ‖E[xxᵀ] − E[yyᵀ]‖²/d².

    Unlike that of a Fréchet distance, the expectation of the unbiased value doesn't depend on the number of clips.
    Raises ScoreError for fewer than two clips per set.
    """
    _check(real, generated, 1)
    x, y = real.raw_root(), generated.raw_root()
    scale = 1.0 / real.dimension**2
    cross = float(((x @ y.T) ** 2).sum())
    own = [float(((root @ root.T) ** 2).sum()) for root in (x, y)]
    unbiased = [
        (moments.count**2 * inner - moments.quartic) / (moments.count * (moments.count - 1))
        for moments, inner in zip((real, generated), own, strict=True)
    ]
    return Kernel(scale * (sum(own) - 2 * cross), scale * (sum(unbiased) - 2 * cross))


def jackknife(value: float, replicates: list[float]) -> tuple[float, float]:
    """Return (standard error, bias-corrected value) of a statistic, from its values with one block left out.

    A percentile bootstrap is wrong here: repeated clips add another copy of the 1/N bias.
    """
    blocks = len(replicates)
    values = np.asarray(replicates)
    error = math.sqrt((blocks - 1) / blocks * float(((values - values.mean()) ** 2).sum()))
    return error, blocks * value - (blocks - 1) * float(values.mean())


def frechet_infinity(real: MomentState, generated: MomentState, ddof: int = 0) -> float:
    """Extrapolate the Fréchet distance to infinitely many clips.

    The bias is proportional to 1/N, so a straight line is fitted to the values over growing numbers of blocks against
    1/blocks. Returns NaN for fewer than 4 clips per block, where the law doesn't hold.
    """
    if min(real.count, generated.count) < 4 * BLOCKS:
        return math.nan
    inverse, values = [], []
    for length in (BLOCKS // 4, BLOCKS // 2, 3 * BLOCKS // 4, BLOCKS):
        starts = range(0, BLOCKS, length) if length < BLOCKS else range(1)
        for start in starts:
            values.append(frechet(real.window(start, length), generated.window(start, length), ddof).value)
            inverse.append(BLOCKS / length)
    slope, intercept = np.polyfit(np.asarray(inverse), np.asarray(values), 1)
    return float(intercept) if math.isfinite(float(slope)) else math.nan


def distance(real: MomentState, generated: MomentState, ddof: int = 0) -> Distance:
    """Return the Fréchet and the kernel distance of two sets, with error bars by block jackknife.

    Raises ScoreError for sets that are too small.
    """
    all_real, all_generated = real.total(), generated.total()
    point, kernel = frechet(all_real, all_generated, ddof), kernel_distance(all_real, all_generated)
    both = sorted(set(real.filled()) & set(generated.filled()))
    if len(both) < 3:
        raise ScoreError(f"{real.count} real and {generated.count} generated clips fill only {len(both)} blocks")
    without_real, without_generated = real.leave_one_out(), generated.leave_one_out()
    pairs = [(without_real[b], without_generated[b]) for b in both]
    replicates = [frechet(a, b, ddof).value for a, b in pairs]
    kernels = [kernel_distance(a, b).unbiased for a, b in pairs]
    error, corrected = jackknife(point.value, replicates)
    return Distance(
        frechet=point,
        standard_error=error,
        bias_corrected=corrected,
        infinity=frechet_infinity(real, generated, ddof),
        kernel=kernel,
        kernel_standard_error=jackknife(kernel.unbiased, kernels)[0],
        real=all_real.count,
        generated=all_generated.count,
        replicates=tuple(replicates),
        kernel_replicates=tuple(kernels),
        warnings=_warnings(all_real, all_generated),
    )


def _warnings(real: Moments, generated: Moments) -> tuple[str, ...]:
    """Return what a reader must know about the two sets."""
    found = []
    for name, moments in (("real", real), ("generated", generated)):
        if moments.count <= moments.dimension:
            found.append(
                f"{moments.count} {name} clips for {moments.dimension} dimensions: the covariance has not full rank, "
                "so the Fréchet distance is mostly sample-size bias; read the unbiased kernel distance"
            )
    if not math.isclose(real.count, generated.count, rel_tol=0.01):
        found.append(f"{real.count} real against {generated.count} generated clips: the bias depends on both")
    return tuple(found)
