"""Parts of the autoencoder: residual blocks, mid-block attention, encoder and the two decoders.

The encoder and the image decoder are SD 2.1's; the temporal decoder is VideoLDM's (§3.1.1) in its released form.

Shapes: N = B·T frames, C channels, H, W pixels of the level. Activations are (N, C, H, W) in channels-last memory,
which is the same memory as (B, T, H·W, C); temporal layers are 2-D convolutions with kernel (3, 1) on that
view, so no Conv3d kernel is ever called. Modules are named as in diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svd.model.kernels.operators import norm_images

SPATIAL_EPS = 1e-6
TEMPORAL_EPS = 1e-5


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice with a residual path; (N, C_in, H, W) to (N, C_out, H, W)."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=SPATIAL_EPS)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=SPATIAL_EPS)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H, W)."""
        h = self.conv1(norm_images(self.norm1, x, silu=True))
        h = self.conv2(norm_images(self.norm2, h, silu=True))
        shortcut = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        return shortcut + h


class TimeConv(nn.Conv3d):
    """A (3, 1, 1) convolution over time; the weight is 5-D, the work is a conv2d on a (B, C, T, H·W) view."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, S) to the same shape, zeros beyond the first and last frame."""
        return F.conv2d(x, self.weight.squeeze(-1), self.bias, padding=(1, 0))


class AutoencoderTemporalResBlock(nn.Module):
    """The residual branch over time, statistics over (T, H, W); it starts at zero."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=TEMPORAL_EPS)
        self.conv1 = TimeConv(channels)
        self.norm2 = nn.GroupNorm(groups, channels, eps=TEMPORAL_EPS)
        self.conv2 = TimeConv(channels)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The branch alone (without the residual path), (B, C, T, S) to (B, C, T, S)."""
        h = self.conv1(norm_images(self.norm1, x, silu=True))
        return self.conv2(norm_images(self.norm2, h, silu=True))


class AutoencoderMixer(nn.Module):
    """Weight of the temporal path, sigmoid(mix_factor); 0.5 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.zeros(1))


def to_time(x: Tensor, frames: int) -> Tensor:
    """Reshape (B·T, C, H, W) to (B, C, T, H·W), a view when the memory is channels-last."""
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n // frames, frames, h * w, c).permute(0, 3, 1, 2)


def from_time(x: Tensor, height: int, width: int) -> Tensor:
    """Reshape (B, C, T, H·W) back to (B·T, C, H, W)."""
    b, c, t, _ = x.shape
    return x.permute(0, 2, 3, 1).reshape(b * t, height, width, c).permute(0, 3, 1, 2)


class SpatioTemporalResBlock(nn.Module):
    """A spatial block, then a temporal one; α weighs the temporal branch, in the U-Net the spatial one.

    out = (1 - α)·s + α·(s + h(s)) = s + α·h(s) with α = sigmoid(mix_factor), s the spatial and h the temporal branch.
    """

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.spatial_res_block = ResBlock(channels_in, channels_out, groups)
        self.temporal_res_block = AutoencoderTemporalResBlock(channels_out, groups)
        self.time_mixer = AutoencoderMixer()

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H, W); `frames` = 0 skips the temporal branch (image mode)."""
        x = self.spatial_res_block(x)
        if frames == 0:
            return x
        branch = self.temporal_res_block(to_time(x, frames))
        alpha = self.time_mixer.mix_factor.sigmoid().to(x.dtype)
        return x + alpha * from_time(branch, x.shape[2], x.shape[3])


class AutoencoderAttention(nn.Module):
    """Single-head self-attention over the pixels of a frame, with a residual path."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=SPATIAL_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        n, c, h, w = x.shape
        tokens = norm_images(self.group_norm, x).permute(0, 2, 3, 1).reshape(n, 1, h * w, c)
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out).reshape(n, h, w, c).permute(0, 3, 1, 2)


class AutoencoderDownsample(nn.Module):
    """Halves the size by a strided convolution that pads below and to the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class AutoencoderUpsample(nn.Module):
    """Doubles the size by repeating pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """Residual blocks of one encoder level and the step down."""

    def __init__(self, channels_in: int, channels_out: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        sizes = [channels_in] + [channels_out] * (layers - 1)
        self.resnets = nn.ModuleList([ResBlock(size, channels_out, groups) for size in sizes])
        self.downsamplers = nn.ModuleList([] if last else [AutoencoderDownsample(channels_out)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H/2, W/2), or (N, C_out, H, W) at the last level."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Block, attention, block at the coarsest level."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AutoencoderAttention(channels, groups)])
        self.resnets = nn.ModuleList([ResBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class AutoencoderEncoder(nn.Module):
    """Frames to the moments of the latent, before `quant_conv`."""

    def __init__(self, channels_in: int, latents: int, widths: Sequence[int], layers: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels_in, widths[0], 3, padding=1)
        before = [widths[0], *widths[:-1]]
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(a, b, layers, groups, last=i == len(widths) - 1)
                for i, (a, b) in enumerate(zip(before, widths, strict=True))
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=SPATIAL_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latents, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 2·latents, h, w)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(norm_images(self.conv_norm_out, self.mid_block(x), silu=True))


class UpBlock(nn.Module):
    """Residual blocks of one decoder level and the step up; with `temporal`, each block has a temporal branch."""

    def __init__(
        self, channels_in: int, channels_out: int, layers: int, groups: int, *, last: bool, temporal: bool
    ) -> None:
        super().__init__()
        block = SpatioTemporalResBlock if temporal else ResBlock
        sizes = [channels_in] + [channels_out] * (layers - 1)
        self.resnets = nn.ModuleList([block(size, channels_out, groups) for size in sizes])
        self.upsamplers = nn.ModuleList([] if last else [AutoencoderUpsample(channels_out)])
        self.temporal = temporal

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, 2H, 2W), or (N, C_out, H, W) at the last level."""
        for block in self.resnets:
            x = block(x, frames) if self.temporal else block(x)
        for layer in self.upsamplers:
            x = layer(x)
        return x


class TemporalMidBlock(nn.Module):
    """Mid block of the temporal decoder: as many residual blocks as the decoder's `layers_per_block`.

    As in diffusers, attention stands between the first two blocks; with one block it isn't used, but its weights
    keep their names.
    """

    def __init__(self, channels: int, layers: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AutoencoderAttention(channels, groups)])
        self.resnets = nn.ModuleList([SpatioTemporalResBlock(channels, channels, groups) for _ in range(layers)])

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """(N, C, h, w) to the same shape."""
        x = self.resnets[0](x, frames)
        if len(self.resnets) > 1:
            x = self.resnets[1](self.attentions[0](x), frames)
        return x


class AutoencoderDecoder(nn.Module):
    """Latents to frames; `temporal` adds the layers over time that remove flicker (VideoLDM §3.1.1)."""

    def __init__(
        self, channels_out: int, latents: int, widths: Sequence[int], layers: int, groups: int, temporal: bool
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latents, widths[-1], 3, padding=1)
        self.mid_block = TemporalMidBlock(widths[-1], layers, groups) if temporal else MidBlock(widths[-1], groups)
        after = list(reversed(widths))
        before = [after[0], *after[:-1]]
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(a, b, layers + 1, groups, last=i == len(widths) - 1, temporal=temporal)
                for i, (a, b) in enumerate(zip(before, after, strict=True))
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=SPATIAL_EPS)
        self.conv_out = nn.Conv2d(widths[0], channels_out, 3, padding=1)
        if temporal:
            self.time_conv_out = TimeConv(channels_out)
            nn.init.dirac_(self.time_conv_out.weight)
            nn.init.zeros_(self.time_conv_out.bias)
        self.temporal = temporal

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """(B·T, latents, h, w) to (B·T, 3, H, W) with T = `frames`; 0 frames skips every temporal layer."""
        x = self.conv_in(x)
        x = self.mid_block(x, frames) if self.temporal else self.mid_block(x)
        for block in self.up_blocks:
            x = block(x, frames)
        x = self.conv_out(norm_images(self.conv_norm_out, x, silu=True))
        if not self.temporal or frames == 0:
            return x
        return from_time(self.time_conv_out(to_time(x, frames)), x.shape[2], x.shape[3])
