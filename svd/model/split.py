"""One clip on several ranks: each has some of the frames and, for temporal layers, some of the positions of all frames.

A clip of 25 x 576 x 1024 then needs a fraction of the memory on each rank. Spatial layers work on a rank's frames as on
any others. Around temporal layers an exchange of all with all turns the split by frames into one by positions and back;
a normalisation over time and positions sums its statistics over the ranks. All of it is exact, and so is the backward
pass: that of an exchange is the opposite exchange, that of a sum over ranks is a sum.

Every rank holds the same weights and gets the same inputs, and every rank gets the whole output. The gradient of a
weight is then the mean over the ranks of what each of them computes, which is what DDP and FSDP form. Shapes as in
layers.py; t of the T frames and s of the S positions are on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svd.core.errors import UserError

# torch.compiler.disable, but for the compiler's import, which takes seconds, at the first call.
eager = torch._disable_dynamo


def shares(count: int, ranks: int) -> list[int]:
    """Return how many of `count` things each rank gets; the first ones get one more where they can't be even.

    >>> shares(25, 4)
    [7, 6, 6, 6]
    """
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


@dataclass(frozen=True)
class Split:
    """The place of this process among the ranks that share a clip; by default it has the clip alone.

    group: the ranks' process group; None on `meta`, where nothing is sent.
    """

    rank: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None

    def own_frames(self, x: Tensor) -> Tensor:
        """Return a view of this rank's frames: (B, T, ...) -> (B, t, ...)."""
        return x.split(shares(x.shape[1], self.ranks), dim=1)[self.rank]

    def all_frames(self, x: Tensor, frames: int) -> Tensor:
        """Gather the T = `frames` frames of a clip on each rank: (B, t, C, H, W) -> (B, T, C, H, W)."""
        if self.ranks == 1:
            return x
        channels = x.shape[2]  # every rank is sent one of as many copies
        copies = x.repeat(1, 1, self.ranks, 1, 1)
        return _exchange(copies, self, _Axis(2, [channels] * self.ranks), _Axis(1, shares(frames, self.ranks)))

    def to_positions(self, x: Tensor, frames: int) -> Tensor:
        """Give each rank all T = `frames` frames of its positions: (B, t, S, C) -> (B, T, s, C).

        Raises UserError when there are fewer positions than ranks.
        """
        if self.ranks == 1:
            return x
        if x.shape[2] < self.ranks:
            raise UserError(f"{self.ranks} ranks can't share a frame of {x.shape[2]} positions; lower 'context_ranks'")
        return _exchange(x, self, _Axis(2, shares(x.shape[2], self.ranks)), _Axis(1, shares(frames, self.ranks)))

    def to_frames(self, x: Tensor, positions: int) -> Tensor:
        """Give each rank all S = `positions` positions of its frames again: (B, T, s, C) -> (B, t, S, C)."""
        if self.ranks == 1:
            return x
        return _exchange(x, self, _Axis(1, shares(x.shape[1], self.ranks)), _Axis(2, shares(positions, self.ranks)))

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place and outside of autograd."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x


class _Axis(NamedTuple):
    """A dimension, and how much of it goes to, or comes from, each rank."""

    dim: int
    sizes: list[int]


@eager
def _exchange(x: Tensor, split: Split, cut: _Axis, join: _Axis) -> Tensor:
    """Cut `x` in pieces along one axis, send one to each rank, and join what comes along the other."""
    out: Tensor = _Exchange.apply(x, split, cut, join)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split, cut: _Axis, join: _Axis) -> Tensor:
        ctx.opposite = split, join, cut
        sent = torch.cat([piece.reshape(-1) for piece in x.split(cut.sizes, cut.dim)])
        shape = list(x.shape)
        shape[cut.dim] = cut.sizes[split.rank]
        row = x.numel() // (x.shape[cut.dim] * x.shape[join.dim])  # numbers at one place of both axes
        coming = [row * size * shape[cut.dim] for size in join.sizes]
        received = x.new_empty(sum(coming))
        if split.group is not None:
            going = [row * size * shape[join.dim] for size in cut.sizes]
            dist.all_to_all_single(received, sent, coming, going, group=split.group)
        shapes = [[*shape[: join.dim], size, *shape[join.dim + 1 :]] for size in join.sizes]
        pieces = received.split(coming)
        return torch.cat([p.view(s) for p, s in zip(pieces, shapes, strict=True)], dim=join.dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(gradients[0], *ctx.opposite), None, None, None


@eager
def group_norm(layer: nn.GroupNorm, x_BTSC: Tensor, split: Split) -> Tensor:
    """Normalise (B, T, s, C) over the frames, the positions of all ranks, and the channels of a group.

    Statistics in float32 or wider.
    """
    out: Tensor = _GroupNorm.apply(x_BTSC, layer.weight, layer.bias, layer.num_groups, layer.eps, split)
    return out


class _GroupNorm(torch.autograd.Function):
    """Keeps its input, means and 1 / deviations, as torch's own does; G groups of c channels, P = T·s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, split: Split) -> Tensor:
        x_BPGc = _wide(x, groups)
        count = x_BPGc.shape[1] * x_BPGc.shape[3]
        variance, mean = (part.double() for part in torch.var_mean(x_BPGc, (1, 3), correction=0))
        # In float64 the square of the mean may be added and taken off again without loss: one sum over ranks does.
        moments = torch.stack([torch.ones_like(mean), mean, variance + mean.square()])
        total, first, second = split.sum(moments * count)
        mean = first / total
        deviation = (second / total - mean.square() + eps).rsqrt()
        statistics = [part[:, None, :, None].to(x_BPGc.dtype) for part in (mean, deviation, 1 / total)]
        ctx.split, ctx.groups = split, groups
        ctx.save_for_backward(x, weight, *statistics)
        normal = (x_BPGc - statistics[0]) * statistics[1]
        return (normal.view(x.shape) * weight + bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, deviation, share = ctx.saved_tensors
        normal, dy = (_wide(x, ctx.groups) - mean) * deviation, _wide(gradients[0], ctx.groups)
        scaled = dy * weight.view(ctx.groups, -1)
        sums = ctx.split.sum(torch.stack([scaled.sum((1, 3)), (scaled * normal).sum((1, 3))]))
        by_mean, by_deviation = sums[:, :, None, :, None] * share
        dx = (scaled - by_mean - normal * by_deviation) * deviation
        dweight, dbias = (dy * normal).sum((0, 1)).flatten(), dy.sum((0, 1)).flatten()
        return dx.view(x.shape).to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None


def _wide(x: Tensor, groups: int) -> Tensor:
    """Return (B, T, s, C) as (B, P, G, c), in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.flatten(1, 2).unflatten(-1, (groups, -1))
