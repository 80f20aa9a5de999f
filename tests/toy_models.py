"""Small models with random weights, and single files in Stability's layout made of them."""

from __future__ import annotations

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import nn

from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.formats.sgm import SgmParts, autoencoder_to_sgm, folded_encoder, stored_config, unet_to_sgm
from svd.model.safetensors import of_module
from svd.model.unet import UNet, UNetConfig

VISION_HEADS = 2


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, a function of the seed alone, and none zero: a zero layer would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            centre = float("norm" in name and name.endswith("weight"))
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def toy_unet(**changes: object) -> UNet:
    values: dict = {
        "in_channels": 8,
        "ids": 3,
        "block_out_channels": (32, 64),
        "attention_levels": (True, False),
        "layers_per_block": 1,
        "head_channels": 16,
        "cross_attention_dim": 32,
        "id_embedding_dim": 32,
        "norm_eps": 1e-6,
    }
    return randomised(UNet(UNetConfig(**values | changes)))


def toy_autoencoder(temporal: bool = True, layers: int = 2, seed: int = 1) -> Autoencoder:
    config = AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=layers, temporal_decoder=temporal)
    return randomised(Autoencoder(config), seed)


def toy_clip() -> nn.Module:
    """open_clip's CLIP, as in SVD's conditioner, at toy size."""
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32, mlp_ratio=4.0)
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    torch.manual_seed(2)
    return open_clip.CLIP(32, vision, text).eval()


def released_layout() -> SgmParts:
    """All prefixes of `svd.safetensors`, with leftovers of the text tower and the conditioner's whole autoencoder."""
    unet, video, image = toy_unet(), toy_autoencoder(), toy_autoencoder(temporal=False, seed=3)
    clip = of_module(toy_clip())
    image_tensors = autoencoder_to_sgm(of_module(image), image.config)
    decoder = {n: t for n, t in autoencoder_to_sgm(of_module(video), video.config).items() if n.startswith("decoder.")}
    return SgmParts(
        unet=unet_to_sgm(of_module(unet), unet.config),
        clip={n: t for n, t in clip.items() if not n.startswith("transformer.") and n != "attn_mask"},
        image_autoencoder=image_tensors,
        first_stage=folded_encoder(image_tensors) | decoder,
        config=stored_config(unet.config, video.config) | {"clip_heads": VISION_HEADS},
    )
