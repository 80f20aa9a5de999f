"""GroupNorm and SiLU of channels-last tokens in two Triton kernels: moments by chunk, then the result.

A candidate for the model; it is measured by benchmarks/gpu and not used elsewhere.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 256


@triton.jit
def _moments(
    x, sums, positions, channels, groups, chunks, CHUNK: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr
):
    """Count-weighted mean and sum of squared deviations of one group in one chunk of positions."""
    row, group, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = channels // groups
    column = tl.arange(0, WIDTH)
    total = tl.zeros((STEP, WIDTH), dtype=tl.float32)
    for start in range(0, CHUNK, STEP):
        position = chunk * CHUNK + start + tl.arange(0, STEP)
        inside = (position < positions)[:, None] & (column < width)[None, :]
        offset = (row * positions + position)[:, None].to(tl.int64) * channels + group * width + column[None, :]
        total += tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(positions - chunk * CHUNK, CHUNK) * width
    mean = tl.sum(total) / count
    squares = tl.zeros((STEP, WIDTH), dtype=tl.float32)
    for start in range(0, CHUNK, STEP):
        position = chunk * CHUNK + start + tl.arange(0, STEP)
        inside = (position < positions)[:, None] & (column < width)[None, :]
        offset = (row * positions + position)[:, None].to(tl.int64) * channels + group * width + column[None, :]
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        squares += tl.where(inside, (value - mean) * (value - mean), 0.0)
    place = ((row * groups + group) * chunks + chunk) * 2
    tl.store(sums + place, mean)
    tl.store(sums + place + 1, tl.sum(squares))


@triton.jit
def _apply(  # type: ignore[no-untyped-def]
    x, y, scale, shift, positions, channels, STEP: tl.constexpr, WIDTH: tl.constexpr
):
    """SiLU(x · scale + shift) with one scale and shift for each row and channel."""
    row, block = tl.program_id(0), tl.program_id(1)
    position = block * STEP + tl.arange(0, STEP)
    column = tl.arange(0, WIDTH)
    inside = (position < positions)[:, None] & (column < channels)[None, :]
    offset = (row * positions + position)[:, None].to(tl.int64) * channels + column[None, :]
    a = tl.load(scale + row * channels + column, mask=column < channels, other=0.0)
    b = tl.load(shift + row * channels + column, mask=column < channels, other=0.0)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) * a[None, :] + b[None, :]
    tl.store(y + offset, (value / (1.0 + tl.exp(-value))).to(y.dtype.element_ty), mask=inside)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """SiLU(GroupNorm(x)) of contiguous (rows, positions, channels); statistics in float32 (Chan's merge of chunks)."""
    rows, positions, channels = x.shape
    chunks = triton.cdiv(positions, CHUNK)
    width = triton.next_power_of_2(channels // groups)
    sums = torch.empty(rows, groups, chunks, 2, device=x.device, dtype=torch.float32)
    _moments[(rows, groups, chunks)](x, sums, positions, channels, groups, chunks, CHUNK, width, 64)
    counts = torch.full((chunks,), float(CHUNK), device=x.device)
    counts[-1] = positions - (chunks - 1) * CHUNK
    means, squares = sums.unbind(-1)
    mean = (means * counts).sum(-1, keepdim=True) / positions
    spread = (squares.sum(-1) + ((means - mean).square() * counts).sum(-1) * (channels // groups)) / (
        positions * (channels // groups)
    )
    deviation = (spread + eps).rsqrt().repeat_interleave(channels // groups, dim=1)
    scale = (deviation * weight.float()).contiguous()
    shift = (bias.float() - mean[..., 0].repeat_interleave(channels // groups, dim=1) * scale).contiguous()
    y = torch.empty_like(x)
    full, step = triton.next_power_of_2(channels), 8
    _apply[(rows, triton.cdiv(positions, step))](x, y, scale, shift, positions, channels, step, full)
    return y
