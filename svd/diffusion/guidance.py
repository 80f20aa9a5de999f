"""Classifier-free guidance with a scale for each frame (D.1, D.4.1, Fig. 16).

D = D_uncond + w_t (D_cond - D_uncond), applied to the denoised clip before the solver's step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from svd.diffusion.edm import Denoiser, Network

Passes = Literal["auto", "batched", "sequential"]


@dataclass(frozen=True)
class Condition:
    """The conditioning of B clips, as the network reads it; every signal given has B as its first dimension.

    context (B, S, D): tokens of the cross-attention (text, or one or two image embeddings); (B, T, S, D) gives every
    frame its own. ids (B, n): micro-conditioning. concat (B, T, C', H, W): channels appended to the noisy latents.
    time_context (B, S', D): separate tokens for the temporal cross-attention (temporal prompting, E.5.4). image_only
    (B,) bool: clips whose frames are unrelated images, which bypass the temporal layers (joint training).
    """

    context: Tensor
    ids: Tensor | None = None
    concat: Tensor | None = None
    time_context: Tensor | None = None
    image_only: Tensor | None = None


ConditionalDenoiser = Callable[[Tensor, Tensor, Condition], Tensor]


def stack(first: Condition, second: Condition) -> Condition:
    """Join two batches, `first` in front; raise ValueError when a signal is in one of them only."""
    joined: dict[str, Tensor | None] = {}
    for name in (field.name for field in fields(Condition)):
        pair = getattr(first, name), getattr(second, name)
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(f"'{name}' must be given in both conditions or in none")
        joined[name] = None if pair[0] is None else torch.cat(pair)
    return Condition(**joined)  # type: ignore[arg-type]


def on_device(condition: Condition, device: torch.device) -> Condition:
    """Move every signal of a condition to a device."""
    values = {field.name: getattr(condition, field.name) for field in fields(Condition)}
    return Condition(**{name: None if value is None else value.to(device) for name, value in values.items()})


def constant(scale: float, frames: int) -> Tensor:
    """Return (T,) the same scale for every frame."""
    return torch.full((frames,), float(scale))


def linear(low: float, high: float, frames: int) -> Tensor:
    """Return (T,) scales that rise linearly from `low` (first frame) to `high` (last frame), the remedy of D.4.1."""
    return torch.linspace(low, high, frames)


def triangle(low: float, high: float, frames: int, period: float = 1.0) -> Tensor:
    """Return (T,) a triangle wave over the frames: `low` at the ends of each period, `high` in its middle.

    period: as a share of the clip. Made for orbits, whose last view lies beside the first.
    """
    phase = torch.linspace(0, 1, frames) / period
    wave = 2 * (phase - (phase + 0.5).floor()).abs()
    return low + (high - low) * wave


def guided(
    denoise: ConditionalDenoiser, cond: Condition, uncond: Condition, scale: Tensor, passes: Passes = "auto"
) -> Denoiser:
    """Make D with guidance; `scale` is (T,), one number per frame; x is (B, T, C, H, W).

    batched: one network call on the doubled batch, ordered [uncond, cond]. sequential: two calls, half the memory.
    auto: batched until a call runs out of device memory, sequential from then on. A scale of 1 everywhere needs no
    unconditional pass.
    """
    if bool((scale == 1).all()):
        return lambda x, sigma: denoise(x, sigma, cond)
    both = stack(uncond, cond)
    mode = passes

    def combined(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal mode
        if mode != "sequential":
            try:
                halves = denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
            except torch.OutOfMemoryError:
                if mode == "batched":
                    raise
                mode = "sequential"
                torch.cuda.empty_cache()
        if mode == "sequential":
            halves = denoise(x, sigma, uncond), denoise(x, sigma, cond)
        weight = scale.to(x).reshape(1, -1, *[1] * (x.ndim - 2))
        return halves[0] + weight * (halves[1] - halves[0])

    return combined


def conditioned(unet: nn.Module, condition: Condition) -> Network:
    """Make F(x_BTCHW, c_noise_B) of a U-Net with its conditioning in place; x is cast to the U-Net's dtype."""
    dtype = next(unet.parameters()).dtype
    context = condition.context.to(dtype)
    time_context = None if condition.time_context is None else condition.time_context.to(dtype)

    def network(x: Tensor, c_noise: Tensor) -> Tensor:
        if condition.concat is not None:
            x = torch.cat([x, condition.concat.to(x.dtype)], dim=2)
        return unet(
            x.to(dtype),
            c_noise,
            context,
            condition.ids,
            time_context_BLD=time_context,
            image_only_B=condition.image_only,
        )

    return network
