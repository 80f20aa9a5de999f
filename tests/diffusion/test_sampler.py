"""Solvers against problems whose exact solution is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svd.diffusion.edm import DiscreteSchedule, expand
from svd.diffusion.sampler import karras_sigmas, sample

SOLVERS = ["euler", "heun", "dpmpp_2m", "ddim"]
MEAN, STD = 0.7, 0.5


def gaussian_denoiser(x, sigma):
    """E[x0 | x] when x0 ~ N(MEAN, STD^2)."""
    sigma = expand(sigma, x)
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def exact(noise, sigma_max):
    """The probability-flow ODE keeps (x - MEAN) / sqrt(STD^2 + sigma^2) constant."""
    start = noise * math.sqrt(1 + sigma_max**2)
    return MEAN + (start - MEAN) * STD / math.sqrt(STD**2 + sigma_max**2)


def error(solver, steps, sigma_max=80.0):
    noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = karras_sigmas(steps, 0.002, sigma_max).double()
    return (sample(gaussian_denoiser, noise, sigmas, solver) - exact(noise, sigma_max)).abs().mean().item()


@pytest.mark.parametrize("solver", SOLVERS)
def test_converges_to_the_exact_solution(solver):
    assert error(solver, 800) < 5e-3
    assert error(solver, 80) < error(solver, 20)


def test_order_of_convergence():
    """Doubling the steps divides Euler's error by about 2, and that of the second-order solvers by about 4."""
    order = {s: math.log2(error(s, 64) / error(s, 128)) for s in SOLVERS}
    assert order["euler"] == pytest.approx(1, abs=0.25)
    assert order["heun"] > 1.6
    assert order["dpmpp_2m"] > 1.6
    assert error("heun", 32) < error("euler", 64) / 2  # at an equal number of network calls
    assert error("dpmpp_2m", 64) < error("euler", 64) / 3


@settings(max_examples=20, deadline=None)
@given(steps=st.integers(1, 40), point=st.floats(-3, 3), solver=st.sampled_from(SOLVERS))
def test_a_single_point_is_hit_exactly(steps, point, solver):
    """When the data are one point, D is constant and every solver is exact in any number of steps."""
    noise = torch.randn(2, 3, dtype=torch.float64)
    sigmas = karras_sigmas(steps).double()
    result = sample(lambda x, sigma: torch.full_like(x, point), noise, sigmas, solver)
    torch.testing.assert_close(result, torch.full_like(noise, point), atol=1e-9, rtol=1e-9)


def test_ddim_is_euler_in_these_coordinates():
    noise = torch.randn(8, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigmas = DiscreteSchedule().ddim_sigmas(20)
    torch.testing.assert_close(
        sample(gaussian_denoiser, noise, sigmas, "ddim"), sample(gaussian_denoiser, noise, sigmas, "euler")
    )


def test_karras_levels():
    sigmas = karras_sigmas(25)
    assert sigmas.shape == (26,)
    expected = [700, 545.73, 421.57, 322.45]
    assert sigmas[:4].tolist() == pytest.approx(expected, rel=1e-4)
    assert sigmas[-4:].tolist() == pytest.approx([0.0248, 0.00788, 0.002, 0], rel=5e-3)
    assert karras_sigmas(1).tolist() == [700, 0]


@pytest.mark.parametrize("arguments", [(0,), (5, 0.0), (5, 2.0, 1.0)])
def test_karras_refuses_nonsense(arguments):
    with pytest.raises(ValueError, match="sigma_min"):
        karras_sigmas(*arguments)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 6), ("heun", 11), ("dpmpp_2m", 6), ("ddim", 6)])
def test_progress_and_number_of_network_calls(solver, calls):
    seen, steps = [], []

    def denoise(x, sigma):
        assert sigma.shape == (3,)
        seen.append(sigma[0].item())
        return gaussian_denoiser(x, sigma)

    sample(denoise, torch.randn(3, 2), karras_sigmas(6), solver, lambda done, total: steps.append((done, total)))
    assert len(seen) == calls
    assert 0 not in seen
    assert steps == [(i + 1, 6) for i in range(6)]
