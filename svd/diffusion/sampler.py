"""Noise levels, and solvers of the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma between them.

Sources: D.1, Eq. 1, and arXiv 2206.00364. A solver is one function here, marked with `@solver`, plus its name in
`svd.config.Solver`; the preset's `sampling.solver`, the option `--solver` and their messages follow from that name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svd.diffusion.edm import Denoiser, DiscreteSchedule, Kind

if TYPE_CHECKING:  # the benchmark of a bare GPU machine samples without pydantic
    from svd.config import Sampling, Solver

Progress = Callable[[int, int], None]
LevelDenoiser = Callable[[Tensor, Tensor], Tensor]
SolverFunction = Callable[[LevelDenoiser, Tensor, Tensor], Iterator[Tensor]]

SOLVERS: dict[str, SolverFunction] = {}


def solver(function: SolverFunction) -> SolverFunction:
    """Register a solver under the name of its function.

    A solver gets `denoise(x, sigma)`, which is D for x (B, …) at one noise level () for all clips; x at the first
    level; and the levels (steps + 1,), which descend and end with 0. It yields x after every step.
    """
    SOLVERS[function.__name__] = function
    return function


@solver
def euler(denoise: LevelDenoiser, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Take Euler's step along the slope at the current level (arXiv 2206.00364, Alg. 1 without the correction)."""
    for sigma, following in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        x = x + (following - sigma) * slope
        yield x


@solver
def heun(denoise: LevelDenoiser, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Correct Euler's step with the slope at its end (arXiv 2206.00364, Alg. 1).

    Calls D twice per step, but once in the last: at level 0 there is no slope.
    """
    for sigma, following in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        step = following - sigma
        predicted = x + step * slope
        if following == 0:
            x = predicted
        else:
            slope_at_end = (predicted - denoise(predicted, following)) / following
            x = x + step * (slope + slope_at_end) / 2
        yield x


@solver
def dpmpp_2m(denoise: LevelDenoiser, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Take DPM-Solver++(2M)'s step (arXiv 2211.01095, Alg. 2): exponential integrator in -ln(sigma), linear in D.

    The slope of D comes from the step before, so D is called once per step; the first step knows none.
    """
    before: tuple[Tensor, Tensor] | None = None
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if following == 0:
            x = denoised
        else:
            h = (sigma / following).log()
            extrapolated = denoised
            if before is not None:
                ratio = (before[0] / sigma).log() / h
                extrapolated = (1 + 1 / (2 * ratio)) * denoised - before[1] / (2 * ratio)
            x = (following / sigma) * x - torch.expm1(-h) * extrapolated
        before = sigma, denoised
        yield x


@solver
def ddim(denoise: LevelDenoiser, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Take the deterministic DDIM step (arXiv 2010.02502, Eq. 12 with eta = 0, divided by sqrt(alpha)).

    The result is the predicted x0 plus the predicted noise at the next level. In these coordinates that is Euler's
    step; what makes it the DDIM of the paper's ablations is `DiscreteSchedule.ddim_sigmas`.
    """
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        noise = (x - denoised) / sigma
        x = denoised + following * noise
        yield x


def sample(
    denoise: Denoiser, noise: Tensor, sigmas: Tensor, solver: Solver = "euler", progress: Progress | None = None
) -> Tensor:
    """Solve the ODE from unit-variance `noise` (B, …) down to sigma = 0; return x0 of the same shape and dtype.

    denoise: D(x, sigma_B). sigmas: (steps + 1,), descending to 0. The start is noise * sqrt(1 + sigma_max^2).
    progress: called with (steps done, steps) after each step.
    """
    levels = sigmas.to(noise)
    steps = len(levels) - 1
    result = noise * (1 + levels[0].square()).sqrt()

    def at_level(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x, sigma.expand(len(x)))

    for done, x in enumerate(SOLVERS[solver](at_level, result, levels), 1):
        result = x
        if progress is not None:
            progress(done, steps)
    return result


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0) -> Tensor:
    """Return (steps + 1,) float32 noise levels from sigma_max down to sigma_min, then 0 (arXiv 2206.00364, Eq. 5).

    Raises ValueError unless steps >= 1 and 0 < sigma_min <= sigma_max.
    """
    if steps < 1 or not 0 < sigma_min <= sigma_max:
        raise ValueError(f"need steps >= 1 and 0 < sigma_min <= sigma_max, got {steps}, {sigma_min}, {sigma_max}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def noise_levels(sampling: Sampling, kind: Kind) -> Tensor:
    """Return the (steps + 1,) levels of a request: Karras', or for `ddim` with a discrete model its schedule's.

    A discrete model knows only the levels of its schedule, so Karras' range is cut to them.
    """
    if kind == "edm-v":
        return karras_sigmas(sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)
    schedule = DiscreteSchedule()
    if sampling.solver == "ddim":
        return schedule.ddim_sigmas(sampling.steps)
    low, high = schedule.sigmas[[0, -1]].tolist()
    return karras_sigmas(sampling.steps, max(low, sampling.sigma_min), min(high, sampling.sigma_max), sampling.rho)
