"""Noise levels and solvers against diffusers' schedulers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from svd.diffusion.edm import DiscreteSchedule, denoiser, scalings
from svd.diffusion.sampler import karras_sigmas, sample
from svd.model.formats.diffusers_configs import scheduler_json

SHAPE = (2, 3, 4, 6, 6)


def network(x, c_noise):
    """A smooth function of both arguments in place of a U-Net; c_noise (B,)."""
    return torch.tanh(0.7 * x + 0.2 * torch.roll(x, 1, -1) + c_noise.reshape(-1, 1, 1, 1, 1) / 3)


def released_scheduler():
    """The scheduler in the released repositories, from the configuration that this project writes."""
    return EulerDiscreteScheduler.from_config({k: v for k, v in scheduler_json().items() if not k.startswith("_")})


@pytest.mark.parametrize("steps", [2, 25, 30, 50])
def test_levels_and_their_embedding(steps):
    scheduler = released_scheduler()
    scheduler.set_timesteps(steps)
    sigmas = karras_sigmas(steps)
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scalings(sigmas[:-1]).c_noise, scheduler.timesteps, rtol=1e-5, atol=1e-5)
    assert float(scheduler.init_noise_sigma) == pytest.approx(math.sqrt(1 + 700**2), rel=1e-6)


def test_25_steps_of_euler():
    scheduler = released_scheduler()
    scheduler.set_timesteps(25)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(output, t, x).prev_sample
    ours = sample(denoiser(network), noise, karras_sigmas(25))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


def eps_network(x, index):
    return network(x, index / 1000)


def test_discrete_levels_are_those_of_stable_diffusion():
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(DiscreteSchedule().sigmas, scheduler.sigmas[:-1].flip(0), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("prediction", "kind"), [("epsilon", "eps"), ("v_prediction", "v")])
def test_ddim_of_the_ablations(prediction, kind):
    """DDIM, 50 steps, on the discrete schedule; diffusers works in the variance-preserving coordinates of the paper."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction,
    )
    scheduler.set_timesteps(50)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(eps_network(x, t.float().expand(len(x))), t, x).prev_sample
    ours = sample(denoiser(eps_network, kind), noise, DiscreteSchedule().ddim_sigmas(50), "ddim")
    torch.testing.assert_close(ours, x, rtol=2e-3, atol=2e-4)


def test_heun():
    scheduler = HeunDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    scheduler.set_timesteps(12)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]])
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), torch.zeros(len(x)))
        x = scheduler.step(output, t, x).prev_sample
    ours = sample(denoiser(lambda x, c: network(x, torch.zeros(len(x))), "eps"), noise, sigmas, "heun")
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


def test_dpmpp_2m():
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        use_karras_sigmas=True,
        final_sigmas_type="zero",
        lower_order_final=True,
        euler_at_final=True,
    )
    scheduler.set_timesteps(15)
    sigmas = scheduler.sigmas
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    x = noise * 1.0
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, torch.zeros(len(x))), t, x).prev_sample
    ours = sample(denoiser(lambda x, c: network(x, torch.zeros(len(x))), "eps"), noise, sigmas, "dpmpp_2m")
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)
