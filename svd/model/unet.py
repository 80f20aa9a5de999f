"""The U-Net F(c_in·x; c_noise, context, ids) of every model in the paper: image, text-to-video, image-to-video,
interpolation and multi-view (§2, §4, App. D). The state-dict names are
those of diffusers' UNetSpatioTemporalConditionModel.

Shapes: B clips, T frames, C latent channels, H x W latent size, L context tokens of width D, n conditioning ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svd.model.blocks import BlockOptions, DownLevel, MidLevel, Signals, UpLevel
from svd.model.layers import NORM_GROUPS, Conv, EmbeddingMLP, GroupNorm, Mixing, sinusoids
from svd.model.split import Split

# Where diffusers and the original agree; see UNetConfig.norm_eps for the others.
ORIGINAL_EPS = 1e-5
FINE_LEVELS = 2
# Widths x sizes x devices' layouts that one compiled block class may meet: 22 blocks at a few clip sizes.
VARIANTS = 128


@dataclass(frozen=True)
class UNetConfig:
    """Sizes and variants of the U-Net; the defaults are SD 2.1 widths and the text-to-video model.

    in_channels: 4 text-to-video, 8 image-to-video and multi-view (latent, conditioning latent), 9 interpolation
      (latent, conditioning latents, mask).
    ids: vector conditioning ids, each embedded with `id_embedding_dim` sinusoids: 0 none, 2 (fps, motion), 3 (+ noise
      augmentation), 4 (+ elevation).
    norm_eps: eps of the residual blocks. Stability's code has 1e-5; diffusers has 1e-6 in all blocks but the
      down levels without attention and the middle, and so does this model with 1e-6.
    norm_groups: groups of every group normalisation. Released models have 32. In a network as narrow as that a group is
      one channel, and its mean over the frame, a colour for example, is normalised away.
    mixer: how α of spatial and temporal branch is made; only "learned_with_images" takes `image_only_B`.
    temporal: False builds the image model of SD 2.1 under the names of UNet2DConditionModel.
    checkpointing: what is recomputed in the backward pass: "fine" the transformers of the two finest levels, "all"
      every residual block and transformer.
    learned_mask: adds the learned mask embedding z_m of D.5 on a grid of `mask_size` (height, width).
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    head_channels: int = 64
    cross_attention_dim: int = 1024
    id_embedding_dim: int = 256
    ids: int = 2
    norm_eps: float = 1e-5
    norm_groups: int = NORM_GROUPS
    mixer: Mixing = "learned_with_images"
    temporal: bool = True
    checkpointing: Literal["none", "fine", "all"] = "none"
    learned_mask: bool = False
    mask_size: tuple[int, int] = (72, 128)

    def __post_init__(self) -> None:
        if len(self.block_out_channels) != len(self.attention_levels):
            raise ValueError(
                f"block_out_channels has {len(self.block_out_channels)} levels, "
                f"attention_levels has {len(self.attention_levels)}"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_groups or channels % self.head_channels:
                raise ValueError(
                    f"block_out_channels: {channels} must be a multiple of {self.norm_groups} "
                    f"and of head_channels {self.head_channels}"
                )


class UNet(nn.Module):
    """The denoising network; `forward` returns F, before the preconditioning of svd.diffusion.edm.

    split: set it to let several ranks share each clip; all of them must then call `forward` with equal inputs.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.split = Split()
        widths = config.block_out_channels
        embedding = 4 * widths[0]
        self.conv_in = Conv(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = EmbeddingMLP(widths[0], embedding, embedding)
        if config.ids:
            self.add_embedding = EmbeddingMLP(config.ids * config.id_embedding_dim, embedding, embedding)
        self.down_blocks = self._encoder()
        self.mid_block = MidLevel(widths[-1], self._options(len(widths) - 1, ORIGINAL_EPS))
        self.up_blocks = self._decoder()
        self.conv_norm_out = GroupNorm(widths[0], ORIGINAL_EPS, config.norm_groups)
        self.conv_out = Conv(widths[0], config.out_channels, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)
        if config.learned_mask:
            self.mask_latent = nn.Parameter(torch.zeros(config.out_channels, *config.mask_size))

    def _options(self, level: int, norm_eps: float) -> BlockOptions:
        config = self.config
        everything = config.checkpointing == "all"
        return BlockOptions(
            embedding_channels=4 * config.block_out_channels[0],
            context_channels=config.cross_attention_dim,
            head_channels=config.head_channels,
            norm_eps=norm_eps,
            norm_groups=config.norm_groups,
            mixing=config.mixer,
            temporal=config.temporal,
            checkpoint_resnets=everything,
            checkpoint_transformers=everything or (config.checkpointing == "fine" and level < FINE_LEVELS),
        )

    def _encoder(self) -> nn.ModuleList:
        config, levels = self.config, nn.ModuleList()
        channels_in = config.block_out_channels[0]
        for level, (channels, attention) in enumerate(
            zip(config.block_out_channels, config.attention_levels, strict=True)
        ):
            options = self._options(level, config.norm_eps if attention else ORIGINAL_EPS)
            down = level + 1 < len(config.block_out_channels)
            levels.append(DownLevel(channels_in, channels, config.layers_per_block, attention, down, options))
            channels_in = channels
        return levels

    def _decoder(self) -> nn.ModuleList:
        config, levels = self.config, nn.ModuleList()
        widths = config.block_out_channels
        x = widths[-1]
        for level in reversed(range(len(widths))):
            channels, coarser = widths[level], widths[max(level - 1, 0)]
            skips = [*[channels] * config.layers_per_block, coarser]
            inputs = [a + b for a, b in zip([x, *[channels] * config.layers_per_block], skips, strict=True)]
            options = self._options(level, config.norm_eps)
            levels.append(UpLevel(inputs, channels, config.attention_levels[level], level > 0, options))
            x = channels
        return levels

    def blocks(self) -> list[nn.Module]:
        """Return the residual blocks and transformers in order of execution: units to compile or to shard."""
        levels = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [m for level in levels for m in [*level.resnets, *getattr(level, "attentions", [])]]

    def compile_blocks(self, **options: Any) -> None:
        """Compile every block by itself, with the options of torch.compile: minutes less than the whole model.

        The 38 blocks are instances of two classes at many widths and sizes. Left to itself dynamo takes those for one
        function of changing shape (slower kernels, and an error of torch 2.11's inductor), hence `dynamic=False` unless
        told otherwise; and it gives up on a function after 8 variants (and runs it eagerly, with a warning only), so
        its limit is raised for the process.
        """
        import torch._dynamo.config as limits  # seconds of imports that only compilation needs

        limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
        for block in self.blocks():
            block.compile(**{"dynamic": False} | options)

    def forward(
        self,
        x_BTCHW: Tensor,
        c_noise_B: Tensor,
        context_BLD: Tensor,
        ids_Bn: Tensor | None = None,
        *,
        time_context_BLD: Tensor | None = None,
        image_mode: bool = False,
        image_only_B: Tensor | None = None,
    ) -> Tensor:
        """F of the paper's Eq. 5: (B, T, C_in, H, W) -> (B, T, C_out, H, W).

        x_BTCHW: c_in·noisy latents, with conditioning channels after them. c_noise_B: ¼ ln σ. context_BLD: text (77
        tokens) or image (1; interpolation 2) embeddings of a clip, or (B, T, L, D) with one for every frame. ids_Bn:
        raw values such as fps - 1, motion bucket, noise augmentation. time_context_BLD: a separate context for the
        temporal layers (temporal prompting, E.5.4); by default that of the first frame. image_mode: skip every temporal
        layer. image_only_B: True for the clips of a joint batch whose frames are still images.
        Raises ValueError for inputs that contradict the configuration.
        """
        self._check(x_BTCHW, context_BLD, ids_Bn, image_only_B)
        B, T = x_BTCHW.shape[:2]
        signals = Signals(
            embedding_BC=F.silu(self._embed(c_noise_B, ids_Bn)),
            context=context_BLD if context_BLD.ndim == 3 else self.split.own_frames(context_BLD).flatten(0, 1),
            time_context_BLD=self._first_frame(context_BLD) if time_context_BLD is None else time_context_BLD,
            frames=T,
            image_mode=image_mode or not self.config.temporal,
            image_only_B=image_only_B,
            split=self.split,
        )
        x_NCHW = self.split.own_frames(x_BTCHW).flatten(0, 1)
        y = self._run(x_NCHW.permute(0, 2, 3, 1).contiguous(), signals)
        return self.split.all_frames(y.permute(0, 3, 1, 2).contiguous().unflatten(0, (B, -1)), T)

    def _run(self, x_NHWC: Tensor, signals: Signals) -> Tensor:
        x = self.conv_in(x_NHWC)
        skips = [x]
        for level in self.down_blocks:
            skips += level(skips[-1], signals)
        x = self.mid_block(skips[-1], signals)
        for level in self.up_blocks:
            x = level(x, skips, signals)
        return self.conv_out(self.conv_norm_out(x, silu=True))

    def _embed(self, c_noise_B: Tensor, ids_Bn: Tensor | None) -> Tensor:
        """Return the sum of noise-level and id embeddings: (B, 4·width)."""
        embedding = self.time_embedding(sinusoids(c_noise_B, self.config.block_out_channels[0]))
        if ids_Bn is not None:
            ids = sinusoids(ids_Bn.flatten(), self.config.id_embedding_dim).view(ids_Bn.shape[0], -1)
            embedding = embedding + self.add_embedding(ids)
        return embedding

    @staticmethod
    def _first_frame(context: Tensor) -> Tensor:
        return context if context.ndim == 3 else context[:, 0]

    def _check(self, x: Tensor, context: Tensor, ids: Tensor | None, image_only: Tensor | None) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[2] != config.in_channels:
            raise ValueError(f"the U-Net takes (B, T, {config.in_channels}, H, W), got {tuple(x.shape)}")
        if context.ndim not in (3, 4) or context.shape[-1] != config.cross_attention_dim:
            raise ValueError(f"the context must be (B, L, {config.cross_attention_dim}), got {tuple(context.shape)}")
        if x.shape[1] < self.split.ranks:
            raise ValueError(f"{self.split.ranks} ranks can't share {x.shape[1]} frames")
        given = 0 if ids is None else ids.shape[1]
        if given != config.ids:
            raise ValueError(f"the U-Net is conditioned on {config.ids} ids, got {given}")
        if image_only is not None and config.mixer != "learned_with_images":
            raise ValueError(f"image_only_B needs the mixer 'learned_with_images', this model has '{config.mixer}'")

    def masked_latent(self, height: int, width: int) -> Tensor:
        """Return the learned mask embedding z_m (D.5), (C, height, width), scaled bilinearly from mask_size.

        Raises ValueError when the model has none.
        """
        if not self.config.learned_mask:
            raise ValueError("this U-Net has no learned mask embedding: set learned_mask in its configuration")
        if self.config.mask_size == (height, width):
            return self.mask_latent
        return F.interpolate(self.mask_latent[None], (height, width), mode="bilinear", align_corners=False)[0]

    def interpolation_channels(self, first_BCHW: Tensor, last_BCHW: Tensor, frames: int) -> Tensor:
        """Return the conditioning channels of interpolation (D.5): (B, C, H, W) twice -> (B, frames, C + 1, H, W).

        The sequence {z_s, z_m, ..., z_m, z_e} and, as the last channel, a mask that is 1 where a frame is given.
        """
        B, _, H, W = first_BCHW.shape
        middle = self.masked_latent(H, W).to(first_BCHW).expand(B, frames - 2, -1, -1, -1)
        latents = torch.cat([first_BCHW[:, None], middle, last_BCHW[:, None]], dim=1)
        mask = torch.zeros(B, frames, 1, H, W, dtype=latents.dtype, device=latents.device)
        mask[:, [0, -1]] = 1
        return torch.cat([latents, mask], dim=2)
