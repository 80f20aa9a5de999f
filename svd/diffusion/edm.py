"""EDM preconditioning, noise distributions and the training objective (§2, App. D.1–D.2, Eqs. 1–13; arXiv 2206.00364).

Notation: x = x0 + sigma * noise is the noisy latent, D(x; sigma) the denoiser, F the raw network:
    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma)).
Shapes: latents (B, T, C, H, W); sigma (B,), one noise level per clip, shared by its T frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

Kind = Literal["eps", "v", "edm-v"]
# The preconditioning that belongs to a training objective, as presets and `svd generate --objective` name it.
KINDS: Mapping[str, Kind] = {"edm": "edm-v", "discrete-v": "v", "discrete-eps": "eps"}
Network = Callable[[Tensor, Tensor], Tensor]
Denoiser = Callable[[Tensor, Tensor], Tensor]
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


class Scalings(NamedTuple):
    """The four factors of the preconditioning, functions of sigma, each (B,)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def scalings(sigma: Tensor, kind: Kind = "edm-v") -> Scalings:
    """Return the preconditioning for noise levels `sigma` > 0, any shape (D.2, Eqs. 5–13).

    eps: Stable Diffusion 2.1 as inherited. edm-v: every SVD model, c_noise = ln(sigma) / 4. v: the same skip and output
    scale on SD's 1000 discrete levels (ablations, E.2). For the discrete kinds c_noise is the index of the nearest
    level.
    """
    variance = sigma.square() + 1
    c_in = variance.rsqrt()
    if kind == "eps":
        return Scalings(torch.ones_like(sigma), -sigma, c_in, DiscreteSchedule().index(sigma))
    c_noise = sigma.log() / 4 if kind == "edm-v" else DiscreteSchedule().index(sigma)
    return Scalings(variance.reciprocal(), -sigma * c_in, c_in, c_noise)


def weighting(sigma: Tensor, kind: Kind = "edm-v") -> Tensor:
    """Return lambda(sigma), the weight of the loss |D - x0|^2; `weighting * c_out**2 == 1` for every kind (D.2)."""
    if kind == "eps":
        return sigma.pow(-2)
    return (1 + sigma.square()) / sigma.square()


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, …, 1), with as many dimensions as `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def randn(shape: Sequence[int], generators: Generators = None) -> Tensor:
    """Draw standard normal numbers (B, …), float32, on the generators' device (CPU without one).

    With one generator for each of the B samples, a sample's numbers don't depend on what else is in the batch.
    """
    if isinstance(generators, Sequence):
        if len(generators) != shape[0]:
            raise ValueError(f"{len(generators)} generators for a batch of {shape[0]}")
        return torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generators])
    return torch.randn(shape, generator=generators, device=generators.device if generators is not None else "cpu")


def v_target(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the target of F for the kinds `v` and `edm-v`: (noise - sigma x0) / sqrt(sigma^2 + 1).

    x0 and noise (B, …), sigma (B,).
    """
    sigma = expand(sigma, x0)
    return (noise - sigma * x0) * (sigma.square() + 1).rsqrt()


def network_target(x0: Tensor, noise: Tensor, sigma: Tensor, kind: Kind = "edm-v") -> Tensor:
    """Return the target of F: the noise for `eps`, else v."""
    return noise if kind == "eps" else v_target(x0, noise, sigma)


def loss(network: Network, latents: Tensor, sigma: Tensor, noise: Tensor, kind: Kind = "edm-v") -> Tensor:
    """Return the denoising loss of each clip, (B,).

    `network(x_BTCHW, c_noise_B)` returns F. The weighted loss lambda |D - x0|^2 equals the plain squared error of F
    because lambda * c_out^2 = 1 (D.2), so it is computed in the network's output space: shorter, and exact in low
    precision too. latents, noise: (B, T, C, H, W); sigma: (B,).
    """
    factors = scalings(sigma, kind)
    noisy = latents + expand(sigma, latents) * noise
    predicted = network(noisy * expand(factors.c_in, latents), factors.c_noise)
    error = predicted.float() - network_target(latents, noise, sigma, kind).float()
    return error.square().flatten(1).mean(1)


def denoiser(network: Network, kind: Kind = "edm-v") -> Denoiser:
    """Make D(x; sigma) of the raw network F; x (B, T, C, H, W) float32 or float64, sigma (B,)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        c_skip, c_out, c_in, c_noise = scalings(sigma, kind)
        predicted = network(x * expand(c_in, x), c_noise).to(x.dtype)
        return expand(c_skip, x) * x + expand(c_out, x) * predicted

    return denoise


@dataclass(frozen=True)
class LogNormal:
    """ln(sigma) ~ N(p_mean, p_std^2): the noise levels of training and of the conditioning frame (D.2–D.5)."""

    p_mean: float
    p_std: float

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw (n,) float32 noise levels, on the generator's device (CPU without one)."""
        device = generator.device if generator is not None else "cpu"
        return (self.p_mean + self.p_std * torch.randn(n, generator=generator, device=device)).exp()


@dataclass(frozen=True)
class DiscreteSchedule:
    """Stable Diffusion's noise levels, beta linear in its square root (SD 2.1 itself, and the ablations of E.2)."""

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120

    @property
    def sigmas(self) -> Tensor:
        """Return (steps,) float32, ascending: sqrt((1 - a) / a) with a the cumulative product of 1 - beta."""
        return self._sigmas64().float()

    def _sigmas64(self) -> Tensor:
        root = torch.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), self.steps, dtype=torch.float64)
        alphas = torch.cumprod(1 - root.square(), 0)
        return ((1 - alphas) / alphas).sqrt()

    def index(self, sigma: Tensor) -> Tensor:
        """Return the index of the nearest level, of sigma's shape and dtype."""
        table = self._sigmas64()
        middles = ((table[1:] + table[:-1]) / 2).to(sigma.device)
        return torch.bucketize(sigma.double(), middles).to(sigma.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw (n,) levels uniformly."""
        device = generator.device if generator is not None else "cpu"
        chosen = torch.randint(self.steps, (n,), generator=generator, device=device)
        return self.sigmas.to(device)[chosen]

    def ddim_sigmas(self, steps: int) -> Tensor:
        """Return DDIM's (steps + 1,) descending levels, the last one 0: `leading` spacing, offset one, as in SD 2.1.

        Raises ValueError unless 1 <= steps < 1000.
        """
        if not 1 <= steps < self.steps:
            raise ValueError(f"DDIM needs between 1 and {self.steps - 1} steps, got {steps}")
        chosen = torch.arange(steps - 1, -1, -1) * (self.steps // steps) + 1
        return torch.cat([self.sigmas[chosen], torch.zeros(1)])


def offset_noise(noise: Tensor, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """Add one random number per clip and channel, shared by all frames and pixels (E.2.1); noise (B, T, C, H, W)."""
    if strength == 0:
        return noise
    batch, _, channels = noise.shape[:3]
    device = generator.device if generator is not None else noise.device
    shift = torch.randn(batch, 1, channels, 1, 1, generator=generator, device=device)
    return noise + strength * shift.to(noise)
