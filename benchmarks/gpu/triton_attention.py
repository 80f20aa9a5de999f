"""Self-attention over frames in one Triton kernel, on the layout of the model: no transposes, no tile of 128 rows.

A fused kernel for long sequences gives each position and head a tile of 64 or 128 queries, of which 14 or 25 frames
fill little. Here a tile has 16 or 32, and one program does a position and a head. A candidate for the model; it is
measured by benchmarks/gpu and not used elsewhere.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _attend(q, k, v, out, frames, positions, heads, scale, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """softmax(q kᵀ · scale) v of one position and head; all tensors are (B, T, S, heads · WIDTH)."""
    position, clip = tl.program_id(0) // heads, tl.program_id(1)
    head = tl.program_id(0) % heads
    frame, column = tl.arange(0, TILE), tl.arange(0, WIDTH)
    row = (clip * frames + frame).to(tl.int64) * positions + position
    place = (row * heads + head)[:, None] * WIDTH + column[None, :]
    inside = (frame < frames)[:, None]
    a = tl.load(q + place, mask=inside, other=0.0)
    b = tl.load(k + place, mask=inside, other=0.0)
    c = tl.load(v + place, mask=inside, other=0.0)
    scores = tl.dot(a, tl.trans(b)).to(tl.float32) * scale
    scores = tl.where((frame < frames)[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    result = tl.dot(weights.to(c.dtype), c)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention among the T frames at each position of contiguous (B, T, S, C), at most 64 frames."""
    clips, frames, positions, channels = q.shape
    out = torch.empty_like(q)
    tile, width = max(16, triton.next_power_of_2(frames)), channels // heads
    # Positions and heads on the first axis of the grid, which alone may be longer than 65,535.
    _attend[(positions * heads, clips)](q, k, v, out, frames, positions, heads, width**-0.5, tile, width, num_warps=1)
    return out
