"""Layers of the U-Net, all on channels-last tokens.

Shapes: B clips, T frames, N = B·T, H·W = S positions, C channels, L context tokens, D context width. Activations are
contiguous (N, H, W, C) everywhere: that is the channels-last memory of a convolution and the token layout of a
transformer at once, so neither needs a permuted copy. Parameter names are those of diffusers.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svd.model.kernels import operators as fused
from svd.model.split import Split, group_norm

# Fused attention kernels put batch·heads or batch on a CUDA grid axis that ends here.
MAX_ATTENTION_BATCH = 65_535
NORM_GROUPS = 32


def sinusoids(values: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [cos | sin] with maximum period 10,000: (n,) -> (n, dim) float32 (§D.2).

    `dim` must be even. The raw values are used, without a factor of 1000.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) * (-math.log(10_000) / half)
    angles = values.float()[:, None] * torch.exp(exponents)[None, :]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, Linear on sinusoids: (n, dim_in) -> (n, dim_out)."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim_hidden)
        self.linear_2 = nn.Linear(dim_hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(x)))


class Conv(nn.Conv2d):
    """2-D convolution on (N, H, W, C), without a change of memory layout."""

    def forward(self, x_NHWC: Tensor) -> Tensor:
        y = self._conv_forward(x_NHWC.permute(0, 3, 1, 2), self.weight, self.bias)
        return y.permute(0, 2, 3, 1).contiguous()


class PointConv(nn.Conv2d):
    """1x1 convolution, which on (N, H, W, C) is a linear layer."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 1)

    def forward(self, x_NHWC: Tensor) -> Tensor:
        return F.linear(x_NHWC, self.weight.flatten(1), self.bias)


class TemporalConv(nn.Conv3d):
    """Convolution over three frames, (B, T, S, C) -> (B, T, S, C'), as a 2-D convolution with kernel (3, 1) on a view.

    The weight keeps the shape (C', C, 3, 1, 1) of the released checkpoints.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x_BTSC: Tensor) -> Tensor:
        y = F.conv2d(x_BTSC.permute(0, 3, 1, 2), self.weight.squeeze(-1), self.bias, padding=(1, 0))
        return y.permute(0, 2, 3, 1).contiguous()


class GroupNorm(nn.GroupNorm):
    """Group normalisation of (n, a, b, C) over a, b and the channels of a group; statistics in float32 or wider."""

    def __init__(self, channels: int, eps: float, groups: int = NORM_GROUPS) -> None:
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        return fused.norm(self, x, silu=silu)

    def over_ranks(self, x_BTSC: Tensor, split: Split) -> Tensor:
        """Normalise (B, T, s, C) over all ranks' positions, then SiLU."""
        if split.ranks == 1:
            return fused.norm(self, x_BTSC, silu=True)
        return F.silu(group_norm(self, x_BTSC, split))


class GEGLU(nn.Module):
    """Linear to two halves, one gated by the GELU of the other: (..., C) -> (..., C')."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return fused.gated_gelu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU of four times the width and a linear layer back: (..., C) -> (..., C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Index 1 is the dropout of the released models, which has rate 0.
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v for (n, heads, length, d), in pieces of a batch that every fused kernel accepts."""
    if q.shape[0] <= MAX_ATTENTION_BATCH:
        return F.scaled_dot_product_attention(q, k, v)
    pieces = zip(*(x.split(MAX_ATTENTION_BATCH) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*piece) for piece in pieces])


class Attention(nn.Module):
    """Multi-head attention in the three forms that the U-Net needs."""

    def __init__(self, dim: int, dim_context: int, head_channels: int) -> None:
        super().__init__()
        self.heads = dim // head_channels
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim_context, dim, bias=False)
        self.to_v = nn.Linear(dim_context, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def over_positions(self, x_NSC: Tensor) -> Tensor:
        """Self-attention among the positions of each frame: (N, S, C) -> (N, S, C)."""
        return self.to_context(x_NSC, x_NSC)

    def over_frames(self, x_BTSC: Tensor) -> Tensor:
        """Self-attention among the frames at each position, without a mask: (B, T, S, C) -> (B, T, S, C)."""
        B, T, S, C = x_BTSC.shape
        q, k, v = self.to_q(x_BTSC), self.to_k(x_BTSC), self.to_v(x_BTSC)
        if fused.can_attend_frames(q, self.heads):
            out = fused.attend_frames(q.contiguous(), k.contiguous(), v.contiguous(), self.heads)
            return self.to_out[0](out)
        # A view for one clip, a copy for several.
        q, k, v = (self._split(x).permute(0, 2, 3, 1, 4).reshape(B * S, self.heads, T, -1) for x in (q, k, v))
        out = attend(q, k, v).reshape(B, S, self.heads, T, -1)
        return self.to_out[0](out.permute(0, 3, 1, 2, 4).reshape(B, T, S, C))

    def to_context(self, x_NSC: Tensor, context_NLD: Tensor) -> Tensor:
        """Attention of each query to the L tokens of its row: (N, S, C), (N, L, D) -> (N, S, C)."""
        q = self._split(self.to_q(x_NSC)).transpose(1, 2)
        k = self._split(self.to_k(context_NLD)).transpose(1, 2)
        v = self._split(self.to_v(context_NLD)).transpose(1, 2)
        return self.to_out[0](attend(q, k, v).transpose(1, 2).flatten(2))

    def to_one_token(self, context_N1D: Tensor) -> Tensor:
        """Attention to a single token: softmax is 1, so it is the same vector for every query. -> (N, 1, C)."""
        return self.to_out[0](self.to_v(context_N1D))


Mixing = Literal["fixed", "learned", "learned_with_images"]


class Mixer(nn.Module):
    """The weight α of the spatial branch: constant, sigmoid(mix_factor), or that and 1 for images (VideoLDM Eq. 2)."""

    def __init__(self, mixing: Mixing, initial: float = 0.5) -> None:
        super().__init__()
        self.mixing = mixing
        factor = torch.full((1,), initial)
        if mixing == "fixed":
            self.register_buffer("mix_factor", factor)
        else:
            self.mix_factor = nn.Parameter(factor)

    def forward(self, image_only_B: Tensor | None) -> Tensor:
        """α as (1, 1, 1, 1), or (B, 1, 1, 1) when there is a mask of clips that are still images."""
        alpha = self.mix_factor if self.mixing == "fixed" else torch.sigmoid(self.mix_factor)
        if image_only_B is not None and self.mixing == "learned_with_images":
            alpha = torch.where(image_only_B, torch.ones_like(alpha), alpha)
        return alpha.view(-1, 1, 1, 1)
