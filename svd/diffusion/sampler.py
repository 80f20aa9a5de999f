"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma (D.1, Eq. 1; arXiv 2206.00364, Alg. 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from svd.diffusion.edm import Denoiser

Solver = Literal["euler", "heun", "dpmpp_2m", "ddim"]
Progress = Callable[[int, int], None]


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0) -> Tensor:
    """(steps + 1,) float32 noise levels from sigma_max down to sigma_min, then 0 (arXiv 2206.00364, Eq. 5)."""
    if steps < 1 or not 0 < sigma_min <= sigma_max:
        raise ValueError(f"need steps >= 1 and 0 < sigma_min <= sigma_max, got {steps}, {sigma_min}, {sigma_max}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def sample(
    denoise: Denoiser, noise: Tensor, sigmas: Tensor, solver: Solver = "euler", progress: Progress | None = None
) -> Tensor:
    """Solve from unit-variance `noise` (B, …) down to sigma = 0; returns x0 of the same shape and dtype.

    denoise(x, sigma_B) is D. The start is noise * sqrt(1 + sigma_max^2). `progress(done, steps)` is called after
    each step. heun evaluates D twice a step (but for the last), the others once. ddim is the deterministic DDIM
    update (eta = 0), which in these coordinates is Euler's: what makes it the DDIM of the paper's ablations is
    `DiscreteSchedule.ddim_sigmas`.
    """
    step = _SOLVERS[solver]
    sigmas = sigmas.to(noise)
    x = noise * (1 + sigmas[0].square()).sqrt()
    steps = len(sigmas) - 1
    history: Tensor | None = None
    for i in range(steps):
        denoised = denoise(x, sigmas[i].expand(len(x)))
        x = step(denoise, x, denoised, history, sigmas, i)
        history = denoised
        if progress is not None:
            progress(i + 1, steps)
    return x


def _euler(denoise: Denoiser, x: Tensor, denoised: Tensor, history: Tensor | None, sigmas: Tensor, i: int) -> Tensor:
    slope = (x - denoised) / sigmas[i]
    return x + (sigmas[i + 1] - sigmas[i]) * slope


def _ddim(denoise: Denoiser, x: Tensor, denoised: Tensor, history: Tensor | None, sigmas: Tensor, i: int) -> Tensor:
    """arXiv 2010.02502, Eq. 12 with eta = 0, divided by sqrt(alpha): predicted x0 plus predicted noise at the next
    level.
    """
    noise = (x - denoised) / sigmas[i]
    return denoised + sigmas[i + 1] * noise


def _heun(denoise: Denoiser, x: Tensor, denoised: Tensor, history: Tensor | None, sigmas: Tensor, i: int) -> Tensor:
    """arXiv 2206.00364, Alg. 1: trapezoidal correction, left out where the next level is 0."""
    slope = (x - denoised) / sigmas[i]
    step = sigmas[i + 1] - sigmas[i]
    predicted = x + step * slope
    if sigmas[i + 1] == 0:
        return predicted
    slope_next = (predicted - denoise(predicted, sigmas[i + 1].expand(len(x)))) / sigmas[i + 1]
    return x + step * (slope + slope_next) / 2


def _dpmpp_2m(denoise: Denoiser, x: Tensor, denoised: Tensor, history: Tensor | None, sigmas: Tensor, i: int) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095, Alg. 2, in sigma: exponential integrator in t = -ln(sigma), linear in D."""
    if sigmas[i + 1] == 0:
        return denoised
    h = (sigmas[i] / sigmas[i + 1]).log()
    if history is not None:
        ratio = (sigmas[i - 1] / sigmas[i]).log() / h
        denoised = (1 + 1 / (2 * ratio)) * denoised - history / (2 * ratio)
    return (sigmas[i + 1] / sigmas[i]) * x - torch.expm1(-h) * denoised


_SOLVERS = {"euler": _euler, "heun": _heun, "dpmpp_2m": _dpmpp_2m, "ddim": _ddim}
