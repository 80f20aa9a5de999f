"""Preconditioning, noise distributions and the objective."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svd.diffusion.edm import (
    DiscreteSchedule,
    LogNormal,
    denoiser,
    expand,
    loss,
    network_target,
    offset_noise,
    scalings,
    v_target,
    weighting,
)

KINDS = ["eps", "v", "edm-v"]
log_sigmas = st.lists(st.floats(-6, 6.5), min_size=1, max_size=4)


def _clips(sigma: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(sigma), 3, 4, 2, 2)
    return tuple(torch.randn(shape, generator=generator, dtype=sigma.dtype) for _ in range(2))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(logs=log_sigmas)
def test_the_weight_cancels_the_output_scale(kind, logs):
    sigma = torch.tensor(logs, dtype=torch.float64).exp()
    product = weighting(sigma, kind) * scalings(sigma, kind).c_out ** 2
    torch.testing.assert_close(product, torch.ones_like(sigma), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(logs=log_sigmas)
def test_a_perfect_network_gives_a_perfect_denoiser(kind, logs):
    sigma = torch.tensor(logs, dtype=torch.float64).exp()
    x0, noise = _clips(sigma)
    target = network_target(x0, noise, sigma, kind)
    denoised = denoiser(lambda x, c: target, kind)(x0 + expand(sigma, x0) * noise, sigma)
    torch.testing.assert_close(denoised, x0, rtol=1e-6, atol=1e-8)


@settings(deadline=None)
@given(logs=log_sigmas)
def test_network_input_and_target_have_unit_variance(logs):
    """With unit-variance data, c_in^2 (1 + sigma^2) = 1 and Var(v) = (1 + sigma^2) / (sigma^2 + 1) = 1."""
    sigma = torch.tensor(logs, dtype=torch.float64).exp()
    torch.testing.assert_close(scalings(sigma).c_in ** 2 * (1 + sigma**2), torch.ones_like(sigma))
    one, zero = torch.ones(len(sigma), 1, dtype=torch.float64), torch.zeros(len(sigma), 1, dtype=torch.float64)
    variance = v_target(one, zero, sigma) ** 2 + v_target(zero, one, sigma) ** 2
    torch.testing.assert_close(variance, one)


def test_scalings_of_the_paper():
    sigma = torch.tensor([0.5, 2.0, 700.0])
    c_skip, c_out, c_in, c_noise = scalings(sigma)
    torch.testing.assert_close(c_skip, 1 / (sigma**2 + 1))
    torch.testing.assert_close(c_out, -sigma / (sigma**2 + 1).sqrt())
    torch.testing.assert_close(c_in, 1 / (sigma**2 + 1).sqrt())
    assert c_noise[2].item() == pytest.approx(1.638, abs=1e-3)
    eps = scalings(sigma, "eps")
    assert eps.c_skip.tolist() == [1, 1, 1]
    torch.testing.assert_close(eps.c_out, -sigma)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_weighted_denoising_error(kind):
    sigma = torch.tensor([0.03, 1.0, 14.0], dtype=torch.float64)
    x0, noise = _clips(sigma)

    def network(x, c_noise):
        return 0.3 * x + expand(c_noise, x) / 1000

    denoised = denoiser(network, kind)(x0 + expand(sigma, x0) * noise, sigma)
    expected = weighting(sigma, kind) * (denoised - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(loss(network, x0, sigma, noise, kind).double(), expected, rtol=1e-5, atol=1e-6)


def test_loss_has_no_batch_interaction():
    sigma = torch.tensor([0.1, 5.0])
    x0, noise = _clips(sigma)
    together = loss(lambda x, c: x * 0.5, x0, sigma, noise)
    alone = loss(lambda x, c: x * 0.5, x0[1:], sigma[1:], noise[1:])
    torch.testing.assert_close(together[1:], alone)


@pytest.mark.parametrize(
    ("p_mean", "p_std"), [(-1.2, 1.0), (0.0, 1.0), (0.5, 1.4), (0.7, 1.6), (1.0, 1.6), (1.0, 1.2), (-3.0, 0.5)]
)
def test_log_normal_moments_of_the_stage_table(p_mean, p_std):
    n = 40_000
    logs = LogNormal(p_mean, p_std).sample(n, torch.Generator().manual_seed(1)).log()
    assert abs(logs.mean() - p_mean) < 4 * p_std / math.sqrt(n)
    assert abs(logs.std() - p_std) < 4 * p_std / math.sqrt(2 * n)


def test_discrete_schedule_of_stable_diffusion():
    schedule = DiscreteSchedule()
    sigmas = schedule.sigmas
    assert sigmas.shape == (1000,)
    assert sigmas[0].item() == pytest.approx(0.02917, abs=1e-5)
    assert sigmas[-1].item() == pytest.approx(14.6146, abs=1e-4)
    assert bool((sigmas.diff() > 0).all())
    assert (1 / (1 + sigmas[-1] ** 2)).item() == pytest.approx(0.00466, abs=2e-5)
    torch.testing.assert_close(schedule.index(sigmas), torch.arange(1000.0))
    assert schedule.index(torch.tensor([1e-9, 1e9])).tolist() == [0, 999]


def test_discrete_levels_are_uniform():
    schedule = DiscreteSchedule()
    drawn = schedule.index(schedule.sample(20_000, torch.Generator().manual_seed(3)))
    counts = torch.histc(drawn, bins=10, min=0, max=999)
    assert bool(((counts - 2000).abs() < 5 * math.sqrt(2000)).all())


def test_ddim_levels_descend_to_zero():
    sigmas = DiscreteSchedule().ddim_sigmas(50)
    assert sigmas.shape == (51,)
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())
    assert sigmas[0] == DiscreteSchedule().sigmas[981]
    with pytest.raises(ValueError, match="between 1 and 999"):
        DiscreteSchedule().ddim_sigmas(1000)


def test_offset_noise_is_shared_by_frames_and_pixels():
    noise = torch.zeros(2, 3, 4, 5, 6)
    shifted = offset_noise(noise, 0.1, torch.Generator().manual_seed(0))
    assert bool((shifted == shifted[:, :1, :, :1, :1]).all())
    assert len(shifted[:, 0, :, 0, 0].unique()) == 8
    assert offset_noise(noise, 0.0) is noise
    many = offset_noise(torch.zeros(500, 1, 4, 1, 1), 0.1, torch.Generator().manual_seed(0))
    assert many.std().item() == pytest.approx(0.1, rel=0.1)
