"""Options of the networks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from svd.config.base import PositiveInt, Section

Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]


class UNetSection(Section):
    """Sizes of the U-Net (§2, D.2); channels in and conditioning ids follow from the task."""

    block_out_channels: list[PositiveInt] = [320, 640, 1280, 1280]
    attention_levels: list[bool] = [True, True, True, False]
    layers_per_block: PositiveInt = 2
    head_channels: PositiveInt = 64
    cross_attention_dim: PositiveInt = 1024
    id_embedding_dim: PositiveInt = 256
    norm_eps: float = Field(1e-5, gt=0)
    norm_groups: PositiveInt = Field(
        32, description="groups of the normalisation; released layouts know 32 alone, narrow networks need fewer"
    )
    position_gain: float = Field(
        1.0,
        gt=0,
        description="factor of the first weights that embed a frame's position: with a linear layer's usual ones the "
        "embeddings of six frames differ by 0.04, beside features of 0.6, which minutes of training don't see",
    )
    mixer: Literal["fixed", "learned", "learned_with_images"] = Field(
        "learned_with_images",
        description="weight of the image layers beside the temporal ones: fixed at 0.5 (which an export writes as what "
        "others can read), one learned number a block, or that and 1 for the images of a joint training",
    )


class AutoencoderSection(Section):
    """Sizes of the autoencoder; the down-sampling factor is 2 ** (levels - 1)."""

    block_out_channels: list[PositiveInt] = [128, 256, 512, 512]
    layers_per_block: PositiveInt = 2
    latent_channels: PositiveInt = 4
    norm_groups: PositiveInt = Field(32, description="groups of the normalisation; diffusers knows 32 alone")
    scaling_factor: float | None = Field(
        0.18215, gt=0, description="None: 1 / std of the latents, measured after training"
    )
    pretrained: str | None = None


class ModelConfig(Section):
    """Networks."""

    unet: UNetSection
    autoencoder: AutoencoderSection
    pretrained: str | None = Field(None, description="an SD 2.1 or SVD file, folder or hub id to start from")
