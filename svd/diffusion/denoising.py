"""From noise to latents: U-Net, conditions, guidance per frame and the solver of a `Sampling`, put together.

Generation and the previews of a training both come through here.
"""

from __future__ import annotations

from torch import Tensor, nn

from svd.config import Sampling
from svd.diffusion.edm import Kind, denoiser
from svd.diffusion.guidance import Condition, Passes, conditioned, guided
from svd.diffusion.sampler import Progress, noise_levels, sample


def denoise_latents(
    unet: nn.Module,
    noise: Tensor,
    cond: Condition,
    uncond: Condition,
    scale: Tensor,
    sampling: Sampling,
    kind: Kind,
    passes: Passes = "auto",
    progress: Progress | None = None,
) -> Tensor:
    """Return scaled latents (B, T, C, h, w) from unit noise of the same shape; everything lies on one device.

    scale: (T,) the guidance of each frame; it takes the place of `sampling.guidance`. kind: the U-Net's
    preconditioning. passes: how guidance runs the U-Net twice, see `guided`.
    """

    def network(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return denoiser(conditioned(unet, condition), kind)(x, sigma)

    denoise = guided(network, cond, uncond, scale, passes)
    return sample(denoise, noise, noise_levels(sampling, kind), sampling.solver, progress)
