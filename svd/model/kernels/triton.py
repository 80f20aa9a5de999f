"""Triton kernels on channels-last tokens: GroupNorm with SiLU and its gradients, attention over frames, gated GELU.

torch's own GroupNorm on a GPU wants channels first: on tokens it copies twice, and it has one program for each row and
group, 32 in all for the temporal layers of one clip. Fused attention gives each position and head a tile of 64 or 128
queries, of which 14 or 25 frames fill little. What each gains is measured by benchmarks/gpu.

Shapes: n rows of P positions with C channels in G groups. Sums are float32, whatever the tokens are.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 256  # positions of a program that sums, at least
CHUNKS = 1024  # programs for each row and block of channels, at most
STEP = 32  # positions in a tile
BLOCK = 64  # channels in a tile: 128 bytes of bfloat16


@triton.jit
def _tile(row, start, stop, block, P, C, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Places of (STEP, BLOCK) values of a row, and which of them exist."""
    position = start + tl.arange(0, STEP)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = (position < stop)[:, None] & (column < C)[None, :]
    return (row.to(tl.int64) * P + position)[:, None] * C + column[None, :], inside


@triton.jit
def _moments(x, partial, P, C, chunk, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and sum of squared deviations of each channel in a chunk of positions: partial is (n, chunks, 2, C)."""
    k, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, column = k * chunk, block * BLOCK + tl.arange(0, BLOCK)
    stop = tl.minimum(start + chunk, P)
    # Deviations from the first value: sums of raw squares would lose the variance behind a large mean.
    first = tl.load(x + (row.to(tl.int64) * P + start) * C + column, mask=column < C, other=0.0).to(tl.float32)
    sums = tl.zeros((STEP, BLOCK), dtype=tl.float32)
    squares = tl.zeros((STEP, BLOCK), dtype=tl.float32)
    for at in range(start, stop, STEP):
        place, inside = _tile(row, at, stop, block, P, C, STEP, BLOCK)
        value = tl.where(inside, tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - first[None, :], 0.0)
        sums += value
        squares += value * value
    count = stop - start
    total = tl.sum(sums, axis=0)
    sums_at = partial + ((row * tl.num_programs(0) + k) * 2).to(tl.int64) * C + column
    tl.store(sums_at, first + total / count, mask=column < C)
    tl.store(sums_at + C, tl.sum(squares, axis=0) - total * total / count, mask=column < C)


@triton.jit
def _parts(row, group, at, P, C, width, chunk, chunks, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Places of the (ROWS, WIDTH) means of a group's channels in chunks, which exist, and the chunks' positions."""
    k, column = at + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    place = (row * chunks + k).to(tl.int64)[:, None] * 2 * C + (group * width + column)[None, :]
    inside = (k < chunks)[:, None] & (column < width)[None, :]
    return place, inside, tl.minimum(P - k * chunk, chunk).to(tl.float32)[:, None]


@triton.jit
def _merge(partial, mean, scale, P, C, chunk, chunks, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Mean and 1 / standard deviation of each group by Chan's formula: mean and scale are (n, G)."""
    group, row = tl.program_id(0), tl.program_id(1)
    width = C // tl.num_programs(0)
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for at in range(0, chunks, ROWS):
        place, inside, count = _parts(row, group, at, P, C, width, chunk, chunks, WIDTH, ROWS)
        total += tl.where(inside, count * tl.load(partial + place, mask=inside, other=0.0), 0.0)
    middle = tl.sum(total) / P / width
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for at in range(0, chunks, ROWS):
        place, inside, count = _parts(row, group, at, P, C, width, chunk, chunks, WIDTH, ROWS)
        deviation = tl.load(partial + place, mask=inside, other=0.0) - middle
        inner = tl.load(partial + place + C, mask=inside, other=0.0)
        total += tl.where(inside, inner + count * deviation * deviation, 0.0)
    place = row * tl.num_programs(0) + group
    tl.store(mean + place, middle)
    tl.store(scale + place, 1.0 / tl.sqrt(tl.sum(total) / P / width + eps))


@triton.jit
def _normal(x, place, inside, column, mean, scale, row, C, G):
    """(x - mean) · scale of a tile, and the scale of its channels."""
    group = row * G + column // (C // G)
    a = tl.load(scale + group, mask=column < C, other=0.0)
    b = tl.load(mean + group, mask=column < C, other=0.0)
    return (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - b[None, :]) * a[None, :], a


@triton.jit
def _channels(weight, bias, block, C, BLOCK: tl.constexpr):
    """The channels of a block, with their weights and biases."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    return column, w, b


@triton.jit
def _apply(
    x, y, weight, bias, mean, scale, P, C, G, SILU: tl.constexpr, TILES: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The normalised, scaled and shifted values, through SiLU if asked."""
    k, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column, w, b = _channels(weight, bias, block, C, BLOCK)
    for tile in range(TILES):
        place, inside = _tile(row, (k * TILES + tile) * STEP, P, block, P, C, STEP, BLOCK)
        value, _ = _normal(x, place, inside, column, mean, scale, row, C, G)
        value = value * w[None, :] + b[None, :]
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(value, dy, w, b, SILU: tl.constexpr):
    """d loss / d (value · w + b) from the gradient of the output."""
    if SILU:
        u = value * w[None, :] + b[None, :]
        gate = tl.sigmoid(u)
        dy = dy * gate * (1.0 + u * (1.0 - gate))
    return dy


@triton.jit
def _gradient_sums(
    x, dy, partial, weight, bias, mean, scale, P, C, G, chunk, SILU: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the inner gradient and of its product with the normalised value: partial is (n, chunks, 2, C)."""
    k, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column, w, b = _channels(weight, bias, block, C, BLOCK)
    stop = tl.minimum(k * chunk + chunk, P)
    plain = tl.zeros((STEP, BLOCK), dtype=tl.float32)
    product = tl.zeros((STEP, BLOCK), dtype=tl.float32)
    for at in range(k * chunk, stop, STEP):
        place, inside = _tile(row, at, stop, block, P, C, STEP, BLOCK)
        value, _ = _normal(x, place, inside, column, mean, scale, row, C, G)
        gradient = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        gradient = _gradient(value, gradient, w, b, SILU)
        plain += gradient
        product += gradient * value
    sums_at = partial + ((row * tl.num_programs(0) + k) * 2).to(tl.int64) * C + column
    tl.store(sums_at, tl.sum(plain, axis=0), mask=column < C)
    tl.store(sums_at + C, tl.sum(product, axis=0), mask=column < C)


@triton.jit
def _gradient_input(
    x, dy, dx, weight, bias, mean, scale, means, P, C, G, SILU: tl.constexpr, TILES: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """scale · (w · g - mean(w · g) - value · mean(w · g · value)), g the inner gradient; means is (n, 2, G)."""
    k, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column, w, b = _channels(weight, bias, block, C, BLOCK)
    group = row * 2 * G + column // (C // G)
    plain = tl.load(means + group, mask=column < C, other=0.0)[None, :]
    product = tl.load(means + group + G, mask=column < C, other=0.0)[None, :]
    for tile in range(TILES):
        place, inside = _tile(row, (k * TILES + tile) * STEP, P, block, P, C, STEP, BLOCK)
        value, factor = _normal(x, place, inside, column, mean, scale, row, C, G)
        gradient = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        gradient = _gradient(value, gradient, w, b, SILU) * w[None, :]
        result = factor[None, :] * (gradient - plain - value * product)
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)


TILES = 4  # of a program that writes


def _sizes(x: Tensor) -> tuple[int, int, int, int, int]:
    """n, P, C, the positions of a chunk and the channels of a block; x (n, ..., C) contiguous."""
    n, channels = x.shape[0], x.shape[-1]
    positions = x.numel() // (n * channels)
    chunk = max(CHUNK, triton.next_power_of_2(triton.cdiv(positions, CHUNKS)))
    return n, positions, channels, chunk, min(BLOCK, triton.next_power_of_2(channels))


def launch_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch GroupNorm, and SiLU if asked, on contiguous (n, ..., C); also means and 1 / deviations (n, G) float32."""
    n, positions, channels, chunk, block = _sizes(x)
    chunks, blocks = triton.cdiv(positions, chunk), triton.cdiv(channels, block)
    partial = torch.empty(n, chunks, 2, channels, device=x.device, dtype=torch.float32)
    mean, scale = (torch.empty(n, groups, device=x.device, dtype=torch.float32) for _ in range(2))
    y, width = torch.empty_like(x), triton.next_power_of_2(channels // groups)
    _moments[(chunks, blocks, n)](x, partial, positions, channels, chunk, STEP, block)
    _merge[(groups, n)](partial, mean, scale, positions, channels, chunk, chunks, eps, width, 32)
    writers = triton.cdiv(positions, STEP * TILES)
    _apply[(writers, blocks, n)](
        x, y, weight, bias, mean, scale, positions, channels, groups, silu, TILES, STEP, block
    )  # fmt: skip
    return y, mean, scale


def launch_group_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the gradients of x, weight and bias of `launch_group_norm`; dy is contiguous as x is."""
    n, positions, channels, chunk, block = _sizes(x)
    groups = mean.shape[1]
    chunks, blocks = triton.cdiv(positions, chunk), triton.cdiv(channels, block)
    partial = torch.empty(n, chunks, 2, channels, device=x.device, dtype=torch.float32)
    _gradient_sums[(chunks, blocks, n)](
        x, dy, partial, weight, bias, mean, scale, positions, channels, groups, chunk, silu, STEP, block
    )  # fmt: skip
    sums = partial.sum(1)
    means = (sums * weight.float()).unflatten(-1, (groups, -1)).mean(-1) / positions
    dx, writers = torch.empty_like(x), triton.cdiv(positions, STEP * TILES)
    _gradient_input[(writers, blocks, n)](
        x, dy, dx, weight, bias, mean, scale, means.contiguous(), positions, channels, groups, silu, TILES, STEP, block
    )  # fmt: skip
    plain, product = (sums[:, kind].sum(0) for kind in range(2))  # outputs of an operator share no memory
    return dx, product.to(weight.dtype), plain.to(bias.dtype)


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


def launch_attend_frames(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Launch attention among the T frames at each position of contiguous (B, T, S, C), at most 64 frames."""
    clips, frames, positions, channels = q.shape
    out = torch.empty_like(q)
    tile, width = max(16, triton.next_power_of_2(frames)), channels // heads
    # Positions and heads on the first axis of the grid, which alone may be longer than 65,535.
    _attend[(positions * heads, clips)](q, k, v, out, frames, positions, heads, width**-0.5, tile, width, num_warps=1)
    return out


@triton.jit
def _gate(x, y, total, C, BLOCK: tl.constexpr):
    """value · GELU(gate) with the halves of each row of x, (rows, 2 C) to (rows, C)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    row, column = place // C, place % C
    value = tl.load(x + row * 2 * C + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * C + C + column, mask=inside, other=0.0).to(tl.float32)
    result = value * 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


def launch_gated_gelu(x: Tensor) -> Tensor:
    """Launch value · GELU(gate) of the halves of contiguous (..., 2 C): (..., C)."""
    y = torch.empty(*x.shape[:-1], x.shape[-1] // 2, device=x.device, dtype=x.dtype)
    _gate[(triton.cdiv(y.numel(), 1024),)](x, y, y.numel(), y.shape[-1], 1024)
    return y
