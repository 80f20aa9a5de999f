"""Names of tensors in Stability's single files (sgm) and in diffusers' folders: the tables between the two.

Rules go from diffusers' names to sgm's; the way back is the inverse of the table that a model's own names give, so a
table is a bijection or an error. Shapes agree but for the autoencoder's attention: sgm stores 1×1 convolutions
(C, C, 1, 1), diffusers linear layers (C, C).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch

from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.unet import UNet, UNetConfig

# Names inside a residual block of the U-Net, and inside a temporal block of the decoder (which has no embedding).
RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def invert(table: dict[str, str]) -> dict[str, str]:
    """Invert a table; raise ValueError when two names share a target."""
    inverse = {target: name for name, target in table.items()}
    if len(inverse) != len(table):
        raise ValueError(f"not a bijection: {len(table)} names give {len(inverse)} targets")
    return inverse


def bijection(names: Iterable[str], rule: Callable[[str], str]) -> dict[str, str]:
    """Map all names to their targets; raise ValueError when it isn't a bijection."""
    found = {name: rule(name) for name in names}
    invert(found)
    return found


def unet_table(config: UNetConfig) -> dict[str, str]:
    """Map diffusers' names of all tensors of a U-Net to sgm's (without `model.diffusion_model.`)."""
    with torch.device("meta"):
        names = UNet(config).state_dict().keys()
    return bijection(names, lambda name: unet_sgm_name(name, config))


def autoencoder_table(config: AutoencoderConfig) -> dict[str, str]:
    """Map diffusers' names of all tensors of an autoencoder to sgm's (without prefix)."""
    with torch.device("meta"):
        names = Autoencoder(config).state_dict().keys()
    return bijection(names, lambda name: autoencoder_sgm_name(name, len(config.block_out_channels)))


def unet_sgm_name(name: str, config: UNetConfig) -> str:
    """Return sgm's name of a U-Net tensor; raise ValueError for a name that no U-Net has.

    The interpolation model's `mask_latent` keeps its name: no released file holds one.
    """
    if name == "mask_latent":
        return name
    stem, leaf = name.rsplit(".", 1)
    if stem in UNET_ENDS:
        return f"{UNET_ENDS[stem]}.{leaf}"
    match = re.match(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)\.(.+)$", name)
    if match is None:
        match = re.match(r"(mid_block)()\.(\w+)\.(\d+)\.(.+)$", name)
    if match is None:
        raise ValueError(f"'{name}' isn't a tensor of the U-Net")
    side, level, kind, layer, rest = match.groups()
    place = _unet_place(side, int(level or 0), kind, int(layer), config)
    if kind in ("downsamplers", "upsamplers"):
        return f"{place}.{rest.replace('conv.', 'op.') if kind == 'downsamplers' else rest}"
    return f"{place}.{_res_block(rest) if kind == 'resnets' else _transformer(rest)}"


def _unet_place(side: str, level: int, kind: str, layer: int, config: UNetConfig) -> str:
    per_level = config.layers_per_block + 1
    if side == "mid_block":
        return f"middle_block.{2 * layer if kind == 'resnets' else 1}"
    if side == "down_blocks":
        index = 1 + level * per_level + (config.layers_per_block if kind == "downsamplers" else layer)
        return f"input_blocks.{index}.{int(kind == 'attentions')}"
    attends = config.attention_levels[len(config.attention_levels) - 1 - level]
    index = level * per_level + (config.layers_per_block if kind == "upsamplers" else layer)
    inner = {"resnets": 0, "attentions": 1, "upsamplers": 2 if attends else 1}[kind]
    return f"output_blocks.{index}.{inner}"


def _res_block(rest: str) -> str:
    """Rename in a block: `spatial_res_block.norm1.weight`, `temporal_res_block.…`, `time_mixer.…`, `norm1.weight`."""
    if rest.startswith("time_mixer."):
        return rest
    prefix = "time_stack." if rest.startswith("temporal_res_block.") else ""
    rest = rest.removeprefix("spatial_res_block.").removeprefix("temporal_res_block.")
    part, leaf = rest.rsplit(".", 1)
    return f"{prefix}{RES_BLOCK[part]}.{leaf}"


def _transformer(rest: str) -> str:
    rest = rest.replace("temporal_transformer_blocks.", "time_stack.")
    return rest.replace("time_pos_embed.linear_1", "time_pos_embed.0").replace(
        "time_pos_embed.linear_2", "time_pos_embed.2"
    )


def autoencoder_sgm_name(name: str, levels: int) -> str:
    """Return sgm's name of an autoencoder tensor; raise ValueError for a name that no autoencoder has."""
    side, _, rest = name.partition(".")
    if side in ("quant_conv", "post_quant_conv"):
        return name
    rest = rest.replace("conv_norm_out.", "norm_out.").replace("time_conv_out.", "conv_out.time_mix_conv.")
    match = re.match(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)$", rest)
    if match:
        way, number, kind, layer, inner = match.groups()
        place = f"down.{number}" if way == "down_blocks" else f"up.{levels - 1 - int(number)}"
        if kind == "resnets":
            return f"{side}.{place}.block.{layer}.{_decoder_block(inner)}"
        return f"{side}.{place}.{kind.removesuffix('rs')}.{inner}"
    match = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)$", rest)
    if match:
        kind, layer, inner = match.groups()
        if kind == "resnets":
            return f"{side}.mid.block_{int(layer) + 1}.{_decoder_block(inner)}"
        part, leaf = inner.rsplit(".", 1)
        return f"{side}.mid.attn_1.{ATTENTION[part]}.{leaf}"
    if side in ("encoder", "decoder") and rest.split(".")[0] in ("conv_in", "conv_out", "norm_out"):
        return f"{side}.{rest}"
    raise ValueError(f"'{name}' isn't a tensor of the autoencoder")


def _decoder_block(inner: str) -> str:
    if inner.startswith("temporal_res_block."):
        part, leaf = inner.removeprefix("temporal_res_block.").rsplit(".", 1)
        return f"time_stack.{RES_BLOCK[part]}.{leaf}"
    inner = inner.removeprefix("spatial_res_block.").removeprefix("time_mixer.")
    return inner.replace("conv_shortcut", "nin_shortcut")


def is_attention_projection(name: str) -> bool:
    """Return whether a diffusers name of the autoencoder is a linear weight that sgm stores as a 1×1 convolution."""
    return bool(re.search(r"mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$", name))
