"""The best linear denoiser of a data set, in closed form: what a network must beat to have learned more than spectra.

A clip's latents x (T, C, h, w) are taken as stationary over space alone, around a mean of their own at every place.
The Fourier transform over (h, w) then separates them: at each spatial frequency the T C coefficients are one vector,
whose covariance the training samples give. A task whose network reads conditioning latents y (N frames, with their
noise) gives them to the filter, too. With x + sigma n and y known,

    m = mean(x) + S_xy S_yy^-1 (y - mean(y)),   S = S_xx - S_xy S_yy^-1 S_yx,
    D(x + sigma n, y) = m + S (S + sigma^2)^-1 (x + sigma n - m)

has the least squared error of all affine functions that treat every place alike (a Wiener filter, with the Gauss-Markov
theorem for y). On Gaussian latents no network is better. Text, CLIP embeddings and conditioning ids are no inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from svd.diffusion.edm import Kind, expand, weighting

_RIDGE = 1e-6  # of the mean variance, on the diagonal of the covariances
Pair = tuple[Tensor, Tensor | None]  # latents (B, T, C, h, w), and conditioning latents (B, N, C, h, w) of one scale


@dataclass(frozen=True)
class LinearFilter:
    """A fitted filter; at each of F spatial frequencies x has d = T C and y e = N C coefficients.

    mean: (T + N, C, h, w) of x and y. gain: (F, d, e) S_xy S_yy^-1. directions (F, d, d), variances (F, d): the
    eigenvectors, in columns, and eigenvalues of S.
    """

    frames: int
    mean: Tensor
    gain: Tensor
    directions: Tensor
    variances: Tensor

    def denoise(self, noisy: Tensor, sigma: Tensor, given: Tensor | None = None) -> Tensor:
        """Return D(x + sigma n, y) of noisy latents (B, T, C, h, w), sigma (B,) and y (B, N, C, h, w)."""
        size = (noisy.shape[-2], noisy.shape[-1])
        x = _spectrum(noisy - self.mean[: self.frames])
        expected = torch.zeros_like(x)
        if given is not None:
            expected = torch.einsum("fij,bfj->bfi", self.gain, _spectrum(given - self.mean[self.frames :]))
        along = torch.einsum("fji,bfj->bfi", self.directions.conj(), x - expected)
        kept = self.variances / (self.variances + sigma.square()[:, None, None])
        found = expected + torch.einsum("fij,bfj->bfi", self.directions, along * kept)
        return _latents(found, noisy.shape[1:3], size) + self.mean[: self.frames]

    def losses(self, latents: Tensor, sigma: Tensor, noise: Tensor, given: Tensor | None, kind: Kind) -> Tensor:
        """Return the loss of each clip, (B,), with the weights of `svd.diffusion.edm.loss`."""
        noisy = latents + expand(sigma, latents) * noise
        error = self.denoise(noisy, sigma, given) - latents
        return weighting(sigma, kind) * error.square().flatten(1).mean(1)

    def expected_loss(self, sigma: float, kind: Kind = "edm-v") -> float:
        """Return the loss that the filter expects of itself at one noise level, from its own covariances.

        For Gaussian latents with these covariances it is the least that any denoiser reaches.
        """
        count = _multiplicity(self.mean.shape[-1], self.mean.shape[-2])
        left = self.variances * sigma**2 / (self.variances + sigma**2)
        mean = (left.mean(1) * count).sum() / count.sum()
        return float(weighting(torch.tensor(sigma), kind) * mean)


def _spectrum(latents: Tensor) -> Tensor:
    """Return the unitary spectrum over space, (B, F, T C), of latents (B, T, C, h, w); half the plane tells it all."""
    return torch.fft.rfft2(latents, norm="ortho").flatten(3).flatten(1, 2).movedim(1, 2)


def _latents(spectrum: Tensor, frames_channels: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """Return the latents (B, T, C, h, w) of a spectrum (B, F, T C)."""
    plane = spectrum.movedim(2, 1).unflatten(1, frames_channels).unflatten(3, (size[0], size[1] // 2 + 1))
    return torch.fft.irfft2(plane, s=size, norm="ortho")


def _multiplicity(width: int, height: int) -> Tensor:
    """Return how often each frequency of the half plane occurs in the whole, (F,): 2, in self-conjugate columns 1."""
    columns = torch.full((width // 2 + 1,), 2.0)
    columns[0] = 1
    if width % 2 == 0:
        columns[-1] = 1
    return columns.repeat(height)


@dataclass
class _Sums:
    """The sums over samples that mean and covariances need, in float64: count, sum, and sum of outer products."""

    count: int
    total: Tensor
    outer: Tensor

    def mean(self) -> Tensor:
        """Return the mean of x and y, (T + N, C, h, w)."""
        return self.total / self.count

    def covariance(self) -> Tensor:
        """Return the covariance at each frequency, (F, d + e, d + e), with a ridge that keeps few samples solvable."""
        middle = _spectrum(self.mean()[None])[0]
        found = self.outer / self.count - middle[:, :, None] * middle[:, None, :].conj()
        size = found.diagonal(dim1=1, dim2=2).real.mean()
        return found + (_RIDGE * size + 1e-12) * torch.eye(found.shape[-1])


def fit(samples: Iterable[Pair]) -> LinearFilter:
    """Fit the filter to batches of clean latents, with the conditioning latents of tasks that have them.

    The covariances are those of the samples, without shrinkage: towards the identity, their diagonal or stationarity in
    time it made the filter worse from 150 samples of 8 frames on. Raises ValueError without samples.
    """
    sums: _Sums | None = None
    frames = channels = 0
    for x, y in samples:
        frames, channels = x.shape[1:3]
        joint = (x if y is None else torch.cat([x, y], 1)).double()
        z = _spectrum(joint)
        part = _Sums(len(x), joint.sum(0), torch.einsum("bfi,bfj->fij", z, z.conj()))
        sums = _Sums(sums.count + part.count, sums.total + part.total, sums.outer + part.outer) if sums else part
    if sums is None:
        raise ValueError("no samples to fit a linear filter to")
    return _filter(frames, frames * channels, sums.mean(), sums.covariance())


def _filter(frames: int, d: int, mean: Tensor, covariance: Tensor) -> LinearFilter:
    """Make the filter of a covariance of x and y, (F, d + e, d + e)."""
    xx, xy, yy = covariance[:, :d, :d], covariance[:, :d, d:], covariance[:, d:, d:]
    gain = torch.linalg.solve(yy, xy.mH).mH if yy.shape[-1] else xy
    variances, directions = torch.linalg.eigh(xx - gain @ xy.mH)
    variances = variances.clamp_min(0).float()
    return LinearFilter(frames, mean.float(), gain.to(torch.complex64), directions.to(torch.complex64), variances)
