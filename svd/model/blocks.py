"""Residual blocks, transformers and the levels of the U-Net (§2, D.2; shapes as in layers.py).

A temporal layer follows every spatial residual block and every spatial transformer (VideoLDM). In image mode none
of the temporal layers runs, so what remains is exactly the image model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svd.model.layers import (
    Attention,
    Conv,
    EmbeddingMLP,
    FeedForward,
    GroupNorm,
    Mixer,
    Mixing,
    PointConv,
    TemporalConv,
    sinusoids,
)
from svd.model.split import Split

TRANSFORMER_EPS = 1e-6


class Signals(NamedTuple):
    """The conditioning of every block.

    embedding_BC: SiLU of the sum of noise-level and id embeddings. context: (B, L, D), or (B·T, L, D), one
    per frame. time_context_BLD: context of the temporal layers. frames: of the whole clip. image_only_B: True for clips
    whose frames are unrelated images, or None. image_mode: no temporal layer runs. split: what of the clip is here.
    """

    embedding_BC: Tensor
    context: Tensor
    time_context_BLD: Tensor
    frames: int
    image_mode: bool
    image_only_B: Tensor | None
    split: Split

    def by_clip(self, x: Tensor) -> Tensor:
        """Tell clips and frames apart: (B·T, ...) -> (B, T, ...)."""
        return x.unflatten(0, (self.embedding_BC.shape[0], -1))


class BlockOptions(NamedTuple):
    """The options that the blocks of one level share."""

    embedding_channels: int
    context_channels: int
    head_channels: int
    norm_eps: float
    norm_groups: int
    mixing: Mixing
    temporal: bool
    checkpoint_resnets: bool
    checkpoint_transformers: bool


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def _run(block: nn.Module, checkpointed: bool, *args: Any) -> Tensor:
    """Run a block; with `checkpointed` only its inputs are kept for the backward pass."""
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


class SpatialResBlock(nn.Module):
    """Residual block of SD 2.1 on each frame: (N, H, W, C) -> (N, H, W, C')."""

    def __init__(self, channels_in: int, channels_out: int, options: BlockOptions) -> None:
        super().__init__()
        self.norm1 = GroupNorm(channels_in, options.norm_eps, options.norm_groups)
        self.conv1 = Conv(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(options.embedding_channels, channels_out)
        self.norm2 = GroupNorm(channels_out, options.norm_eps, options.norm_groups)
        self.conv2 = Conv(channels_out, channels_out, 3, padding=1)
        _zero(self.conv2)
        if channels_in != channels_out:
            self.conv_shortcut = PointConv(channels_in, channels_out)
        self.has_shortcut = channels_in != channels_out

    def forward(self, x_NHWC: Tensor, skip_NHWC: Tensor | None, signals: Signals) -> Tensor:
        """Run the block; `skip_NHWC` is concatenated here, so that a checkpoint keeps no copy of the two."""
        x = x_NHWC if skip_NHWC is None else torch.cat([x_NHWC, skip_NHWC], dim=-1)
        embedding = self.time_emb_proj(signals.embedding_BC)[:, None, None, None, :]
        h = self.conv1(self.norm1(x, silu=True))
        h = (signals.by_clip(h) + embedding).flatten(0, 1)
        h = self.conv2(self.norm2(h, silu=True))
        return (self.conv_shortcut(x) if self.has_shortcut else x) + h


class TemporalResBlock(nn.Module):
    """The branch h of the temporal residual block x + h, statistics over all frames: (B, T, S, C) -> (B, T, S, C)."""

    def __init__(self, channels: int, options: BlockOptions) -> None:
        super().__init__()
        self.norm1 = GroupNorm(channels, options.norm_eps, options.norm_groups)
        self.conv1 = TemporalConv(channels, channels)
        self.time_emb_proj = nn.Linear(options.embedding_channels, channels)
        self.norm2 = GroupNorm(channels, options.norm_eps, options.norm_groups)
        self.conv2 = TemporalConv(channels, channels)
        _zero(self.conv2)

    def forward(self, x_BTSC: Tensor, signals: Signals) -> Tensor:
        embedding = self.time_emb_proj(signals.embedding_BC)[:, None, None, :]
        h = self.conv1(self.norm1.over_ranks(x_BTSC, signals.split)) + embedding
        return self.conv2(self.norm2.over_ranks(h, signals.split))


class VideoResBlock(nn.Module):
    """Spatial residual block and temporal one, mixed: (N, H, W, C) -> (N, H, W, C')."""

    def __init__(self, channels_in: int, channels_out: int, options: BlockOptions) -> None:
        super().__init__()
        self.spatial_res_block = SpatialResBlock(channels_in, channels_out, options)
        self.temporal_res_block = TemporalResBlock(channels_out, options)
        self.time_mixer = Mixer(options.mixing)

    def forward(self, x_NHWC: Tensor, skip_NHWC: Tensor | None, signals: Signals) -> Tensor:
        x = self.spatial_res_block(x_NHWC, skip_NHWC, signals)
        if signals.image_mode:
            return x
        x_BTSC = signals.by_clip(x.flatten(1, 2))
        h = self.temporal_res_block(signals.split.to_positions(x_BTSC, signals.frames), signals)
        h = signals.split.to_frames(h, x_BTSC.shape[2])
        # α·x + (1 - α)·(x + h) = x + (1 - α)·h
        mixed = torch.addcmul(x_BTSC, (1 - self.time_mixer(signals.image_only_B)).to(h.dtype), h)
        return mixed.view_as(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward of SD 2.1 on each frame: (N, S, C) -> (N, S, C)."""

    def __init__(self, channels: int, options: BlockOptions) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, options.head_channels)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, options.context_channels, options.head_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x_NSC: Tensor, context: Tensor) -> Tensor:
        x = x_NSC + self.attn1.over_positions(self.norm1(x_NSC))
        x = x + self.cross_attention(x, context)
        return x + self.ff(self.norm3(x))

    def cross_attention(self, x: Tensor, context_RLD: Tensor) -> Tensor:
        """Attend from (..., C) to a context whose R rows divide the first axis: rows share K and V without copies.

        With one token the queries have no effect, so norm2, to_q and to_k are not evaluated.
        """
        rows = context_RLD.shape[0]
        if context_RLD.shape[1] == 1:
            out = self.attn2.to_one_token(context_RLD)
            return out.repeat_interleave(x.shape[0] // rows, dim=0).view(x.shape[0], *(1,) * (x.ndim - 2), -1)
        x_RSC = self.norm2(x).reshape(rows, -1, x.shape[-1])
        return self.attn2.to_context(x_RSC, context_RLD).view_as(x)


class TemporalTransformerBlock(TransformerBlock):
    """Feed-forward, attention over frames, cross-attention, feed-forward: (B, T, S, C) -> (B, T, S, C)."""

    def __init__(self, channels: int, options: BlockOptions) -> None:
        super().__init__(channels, options)
        self.norm_in = nn.LayerNorm(channels)
        self.ff_in = FeedForward(channels)

    def forward(self, x_BTSC: Tensor, context: Tensor) -> Tensor:
        x = x_BTSC + self.ff_in(self.norm_in(x_BTSC))
        x = x + self.attn1.over_frames(self.norm1(x))
        x = x + self.cross_attention(x, context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Spatial transformer and, unless it is an image model, temporal transformer: (N, H, W, C) -> (N, H, W, C)."""

    def __init__(self, channels: int, options: BlockOptions) -> None:
        super().__init__()
        self.channels = channels
        self.norm = GroupNorm(channels, TRANSFORMER_EPS, options.norm_groups)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, options)])
        if options.temporal:
            self.temporal_transformer_blocks = nn.ModuleList([TemporalTransformerBlock(channels, options)])
            self.time_pos_embed = EmbeddingMLP(channels, 4 * channels, channels)
            self.time_mixer = Mixer(options.mixing)
        self.proj_out = nn.Linear(channels, channels)
        _zero(self.proj_out)

    def forward(self, x_NHWC: Tensor, signals: Signals) -> Tensor:
        x_NSC = self.proj_in(self.norm(x_NHWC).flatten(1, 2))
        x_NSC = self.transformer_blocks[0](x_NSC, signals.context)
        if not signals.image_mode:
            x_BTSC = signals.split.to_positions(signals.by_clip(x_NSC), signals.frames)
            x_NSC = signals.split.to_frames(self._mix_frames(x_BTSC, signals), x_NSC.shape[1]).flatten(0, 1)
        return x_NHWC + self.proj_out(x_NSC).view_as(x_NHWC)

    def _mix_frames(self, x_BTSC: Tensor, signals: Signals) -> Tensor:
        frames = torch.arange(signals.frames, device=x_BTSC.device)
        position_TC = self.time_pos_embed(sinusoids(frames, self.channels))
        y = self.temporal_transformer_blocks[0](x_BTSC + position_TC[:, None, :], signals.time_context_BLD)
        return torch.lerp(y, x_BTSC, self.time_mixer(signals.image_only_B).to(y.dtype))


class Downsample(nn.Module):
    """Halve height and width: (N, H, W, C) -> (N, ⌈H/2⌉, ⌈W/2⌉, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, stride=2, padding=1)

    def forward(self, x_NHWC: Tensor) -> Tensor:
        return self.conv(x_NHWC)


class Upsample(nn.Module):
    """Nearest-neighbour scaling to a given size and a convolution: (N, H, W, C) -> (N, H', W', C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, padding=1)

    def forward(self, x_NHWC: Tensor, size: tuple[int, int]) -> Tensor:
        x = F.interpolate(x_NHWC.permute(0, 3, 1, 2), size=size, mode="nearest")
        return self.conv(x.permute(0, 2, 3, 1).contiguous())


class Level(nn.Module):
    """Residual blocks, each followed by a transformer when `attention` is set; base of down and up levels."""

    def __init__(self, channels_in: Sequence[int], channels: int, attention: bool, options: BlockOptions) -> None:
        super().__init__()
        resnet = VideoResBlock if options.temporal else SpatialResBlock
        self.resnets = nn.ModuleList([resnet(c, channels, options) for c in channels_in])
        if attention:
            self.attentions = nn.ModuleList([Transformer(channels, options) for _ in channels_in])
        self.attention = attention
        self.checkpoint_resnets = options.checkpoint_resnets
        self.checkpoint_transformers = options.checkpoint_transformers

    def layer(self, index: int, x_NHWC: Tensor, skip_NHWC: Tensor | None, signals: Signals) -> Tensor:
        """Run the residual block at `index` and its transformer."""
        x = _run(self.resnets[index], self.checkpoint_resnets, x_NHWC, skip_NHWC, signals)
        if self.attention:
            x = _run(self.attentions[index], self.checkpoint_transformers, x, signals)
        return x


class DownLevel(Level):
    """A level of the encoder, with a down-sampling unless it is the last."""

    def __init__(
        self, channels_in: int, channels: int, depth: int, attention: bool, down: bool, options: BlockOptions
    ) -> None:
        super().__init__([channels_in, *[channels] * (depth - 1)], channels, attention, options)
        if down:
            self.downsamplers = nn.ModuleList([Downsample(channels)])
        self.down = down

    def forward(self, x_NHWC: Tensor, signals: Signals) -> list[Tensor]:
        """Return the output of every layer; the last is the output of the level."""
        outputs: list[Tensor] = []
        for index in range(len(self.resnets)):
            x_NHWC = self.layer(index, x_NHWC, None, signals)
            outputs.append(x_NHWC)
        if self.down:
            outputs.append(self.downsamplers[0](x_NHWC))
        return outputs


class MidLevel(nn.Module):
    """Residual block, transformer, residual block at the coarsest resolution."""

    def __init__(self, channels: int, options: BlockOptions) -> None:
        super().__init__()
        resnet = VideoResBlock if options.temporal else SpatialResBlock
        self.resnets = nn.ModuleList([resnet(channels, channels, options) for _ in range(2)])
        self.attentions = nn.ModuleList([Transformer(channels, options)])
        self.checkpoint_resnets = options.checkpoint_resnets
        self.checkpoint_transformers = options.checkpoint_transformers

    def forward(self, x_NHWC: Tensor, signals: Signals) -> Tensor:
        x = _run(self.resnets[0], self.checkpoint_resnets, x_NHWC, None, signals)
        x = _run(self.attentions[0], self.checkpoint_transformers, x, signals)
        return _run(self.resnets[1], self.checkpoint_resnets, x, None, signals)


class UpLevel(Level):
    """A level of the decoder, fed with the encoder's outputs, with an up-sampling unless it is the last."""

    def __init__(
        self, channels_in: Sequence[int], channels: int, attention: bool, up: bool, options: BlockOptions
    ) -> None:
        super().__init__(channels_in, channels, attention, options)
        if up:
            self.upsamplers = nn.ModuleList([Upsample(channels)])
        self.up = up

    def forward(self, x_NHWC: Tensor, skips: list[Tensor], signals: Signals) -> Tensor:
        """Take skips from the end of `skips`; the next one left gives the size to scale up to."""
        for index in range(len(self.resnets)):
            x_NHWC = self.layer(index, x_NHWC, skips.pop(), signals)
        if self.up:
            x_NHWC = self.upsamplers[0](x_NHWC, (skips[-1].shape[1], skips[-1].shape[2]))
        return x_NHWC
