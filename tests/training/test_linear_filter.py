"""The linear filter is the best linear denoiser: exact against dense algebra, and optimal on Gaussian data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from svd.core.margins import margin
from svd.diffusion.edm import weighting
from svd.training.linear_filter import LinearFilter, fit

T, C, H, W = 2, 2, 4, 6


def spectrum() -> Tensor:
    """Amplitudes of a Gaussian field, (C, H, W): falling with frequency, other per channel, even in both directions."""
    y, x = torch.meshgrid(torch.fft.fftfreq(H), torch.fft.fftfreq(W), indexing="ij")
    fall = 1 / (0.2 + torch.hypot(y, x))
    return torch.stack([fall, 0.4 * fall.square()])


def fields(count: int, seed: int) -> Tensor:
    """Draw (count, T, C, H, W) Gaussian clips: the second frame is 0.9 of the first and 0.3 of an independent field."""
    noise = torch.randn(count, 2, C, H, W, generator=torch.Generator().manual_seed(seed))
    free = torch.fft.ifft2(torch.fft.fft2(noise) * spectrum()).real
    return torch.stack([free[:, 0], 0.9 * free[:, 0] + 0.3 * free[:, 1]], 1) + torch.linspace(-1, 1, W)


def variances() -> Tensor:
    """The exact eigenvalues of the clips' covariance, (2 C H W)."""
    frames = torch.tensor([[1.0, 0.9], [0.9, 0.9**2 + 0.3**2]])
    return (torch.linalg.eigvalsh(frames)[:, None] * spectrum().square().flatten()).flatten()


def optimum(sigma: float) -> float:
    """The least loss of any denoiser on these clips at one noise level, known in closed form."""
    left = variances() * sigma**2 / (variances() + sigma**2)
    return float(weighting(torch.tensor(sigma)) * left.mean())


def noised(clips: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    return torch.full((len(clips),), sigma), torch.randn(clips.shape, generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def fitted() -> LinearFilter:
    return fit((part, None) for part in fields(6000, 0).split(500))


@pytest.mark.parametrize("sigma", [0.1, 1.0, 5.0])
def test_on_gaussian_clips_it_reaches_the_optimum_and_never_passes_it(fitted: LinearFilter, sigma: float) -> None:
    clips = fields(3000, 1)
    losses = fitted.losses(clips, *noised(clips, sigma), None, "edm-v")
    error = losses.std() / math.sqrt(len(clips))
    assert losses.mean() == pytest.approx(optimum(sigma), abs=float(4 * error), rel=0.005)
    assert losses.mean() > optimum(sigma) - 3 * error
    assert fitted.expected_loss(sigma) == pytest.approx(optimum(sigma), rel=0.02)


def dense(function_of_clips: Tensor) -> tuple[Tensor, Tensor]:
    flat = function_of_clips.flatten(1).double()
    return flat.mean(0), torch.cov(flat.T, correction=0)


def shifted_everywhere(clips: Tensor) -> Tensor:
    """All cyclic shifts of centred clips: their sample covariance is exactly stationary over space."""
    shifts = [clips.roll((dy, dx), (-2, -1)) for dy in range(H) for dx in range(W)]
    return torch.cat(shifts)


@pytest.mark.parametrize("given", [False, True])
def test_it_equals_the_dense_conditional_expectation(given: bool) -> None:
    """Against the textbook formula on the whole (T + N) C H W vector, with the very same second moments."""
    base = fields(40, 2)
    clips = shifted_everywhere(base - base.mean(0))
    noise = 0.2 * torch.randn(clips.shape[0] // (H * W), 1, C, H, W, generator=torch.Generator().manual_seed(3))
    y = shifted_everywhere((base - base.mean(0))[:, :1] + noise - noise.mean(0)) if given else None
    found = fit([(clips, y)])
    joint = clips if y is None else torch.cat([clips, y], 1)
    mean, covariance = dense(joint)
    sigma, draw = noised(clips[:5], 0.7)
    noisy = clips[:5] + 0.7 * draw
    d, seen = clips[0].numel(), torch.cat([noisy.flatten(1), joint[:5, T:].flatten(1)], 1).double()
    observed = covariance.clone()
    observed[:d, :d] += 0.49 * torch.eye(d)
    wanted = mean[:d] + (seen - mean) @ torch.linalg.solve(observed, covariance[:, :d])
    made = found.denoise(noisy, sigma, None if y is None else y[:5])
    assert (made.flatten(1) - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_what_is_given_helps_and_only_where_it_is_given() -> None:
    clips, test = fields(4000, 4), fields(500, 5)
    blind, seeing = fit([(clips, None)]), fit([(clips, clips[:, :1])])
    sigma, noise = noised(test, 3.0)
    cut = fit([(clips, fields(4000, 6)[:, :1])])  # y of other clips: nothing to learn from it
    losses = {
        "blind": blind.losses(test, sigma, noise, None, "edm-v"),
        "seeing": seeing.losses(test, sigma, noise, test[:, :1], "edm-v"),
        "cut": cut.losses(test, sigma, noise, test[:, :1], "edm-v"),
    }
    mean = {name: float(values.mean()) for name, values in losses.items()}
    assert mean["seeing"] < 0.5 * mean["blind"] and mean["cut"] == pytest.approx(mean["blind"], rel=0.03)
    made = seeing.denoise(test + 3 * noise, sigma, test[:, :1])
    assert (made[:, 0] - test[:, 0]).abs().max() < 0.01


def test_few_samples_are_enough_to_be_finite() -> None:
    found = fit([(fields(2, 7), fields(2, 7)[:, :1])])
    clips = fields(8, 8)
    assert found.losses(clips, *noised(clips, 1.0), clips[:, :1], "edm-v").isfinite().all()
    with pytest.raises(ValueError, match="no samples"):
        fit([])


def test_a_margin_counts_the_spread_within_strata_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    level = torch.arange(4).repeat(500).double()
    differences = 10 * (level - 1.5) + 0.1 + torch.randn(2000, generator=draw).double()
    plain, paired = margin(differences.tolist()), margin(differences.tolist(), level.tolist())
    assert plain is not None and paired is not None and abs(plain) < 1.5 < 3 < paired < 8
    nothing = [margin(torch.randn(64, generator=draw).tolist(), [0, 1] * 32) for _ in range(400)]
    assert 0.02 < sum(abs(value or 0.0) > 2 for value in nothing) / 400 < 0.09  # two-sided 5 %
    assert margin([1.0]) is None and margin([2.0, 2.0]) is None


@pytest.mark.parametrize("value", [0.1, 0.7])
def test_differences_that_are_alike_but_for_rounding_have_no_margin(value: float) -> None:
    assert margin([value] * 6) is None
    assert margin([value] * 6, [0, 0, 0, 1, 1, 1]) is None
