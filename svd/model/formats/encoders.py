"""Load the text and image encoders: the stage's folder, a released file or folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import open_clip
import torch

from svd.config import EncodersConfig
from svd.core.errors import UserError
from svd.model.encoders import Encoders, ImageEncoder, TextEncoder
from svd.model.formats.clip import load_image_tower, load_stored_clip, tower_config
from svd.model.formats.clip_names import text_to_open_clip
from svd.model.formats.folders import IMAGE_PART, TEXT_PART, weights_file
from svd.model.formats.sgm import one_line_errors, read_sgm
from svd.model.safetensors import Lazy, fill, read_tensors

VOCABULARY = 49408  # of CLIP's tokenizer


def load_text_encoder(
    tensors: Mapping[str, Lazy], what: str, device: torch.device | str = "cpu", head_channels: int = 64
) -> TextEncoder:
    """Build SD 2.1's text encoder, frozen, float32: open_clip's whole text tower, as single files hold it.

    tensors: open_clip's names. what: the beginning of messages. head_channels: 64 in all of open_clip's released text
    towers. Raises UserError for missing, unexpected and misshaped tensors.
    """
    with one_line_errors(what):
        length, width = tensors["positional_embedding"].shape
        vocabulary, embedding = tensors["token_embedding.weight"].shape[0], tensors["text_projection"].shape[1]
    layers = len({name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")})
    cfg = open_clip.CLIPTextCfg(length, vocabulary, width=width, heads=max(1, width // head_channels), layers=layers)
    # CLIP's temperature is no part of the tower, and the mask, which old versions stored, is a constant.
    own = {name: tensor for name, tensor in tensors.items() if name not in ("logit_scale", "attn_mask")}
    return _text_encoder(cfg, embedding, own, what, device)


def load_text_folder(path: Path, device: torch.device | str = "cpu") -> TextEncoder:
    """Load SD 2.1's text encoder, frozen, float32, from a folder in transformers' layout (CLIPTextModel).

    Its last layer is the last but one of open_clip's tower, which SD reads: the folder has 23 layers of ViT-H's 24.
    The tokens are those of SD 2.1's `tokenizer/` (CLIP's vocabulary, padded with token 0). Raises UserError for
    missing, broken and unfitting files.
    """
    config = tower_config(path, "CLIPTextModel", "vocab_size", "max_position_embeddings")
    if config["vocab_size"] != VOCABULARY:
        raise UserError(f"{path / 'config.json'}: a vocabulary of {config['vocab_size']}, CLIP's has {VOCABULARY}")
    cfg = open_clip.CLIPTextCfg(
        config["max_position_embeddings"],
        VOCABULARY,
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        mlp_ratio=config["intermediate_size"] / config["hidden_size"],
    )
    tensors = text_to_open_clip(read_tensors(weights_file(path, "model")), str(path))
    return _text_encoder(cfg, None, tensors, f"{path} doesn't fit its config.json", device)


def _text_encoder(
    cfg: open_clip.CLIPTextCfg,
    embedding: int | None,
    tensors: Mapping[str, Lazy],
    what: str,
    device: torch.device | str,
) -> TextEncoder:
    """Build the tower and fill it; embedding: size of the joint space, None for a tower that isn't whole."""
    with torch.device("meta"):
        clip = open_clip.CLIP(embedding or 1, open_clip.CLIPVisionCfg(layers=1, image_size=16), cfg)
        encoder = TextEncoder(clip, embedding is not None)
    fill(encoder, tensors, what, device, torch.float32)
    length = cfg.context_length
    encoder.attn_mask = torch.full((length, length), float("-inf"), device=device).triu_(1)
    return encoder.requires_grad_(False).eval()


def load_encoders(folder: Path, config: EncodersConfig, device: torch.device | str = "cpu") -> Encoders:
    """Load the encoders that the stage `encoders` left in `folder`, frozen, float32.

    A released model is accepted too, as a pipeline in diffusers' layout or as a single file: SVD's holds an image
    encoder, SD 2.1's a text encoder. Raises UserError when the encoders can't be had.
    """
    if folder.is_file():
        return _of_file(folder, device)
    parts = [part for part in (TEXT_PART, IMAGE_PART) if (folder / part / "config.json").is_file()]
    if parts:
        text = load_text_folder(folder / TEXT_PART, device) if TEXT_PART in parts else None
        image = _image_encoder(folder / IMAGE_PART, device) if IMAGE_PART in parts else None
        kinds = " and ".join(part.replace("_", " ") for part in parts)
        return Encoders(text, image, f"{kinds} of {folder.name}")
    clip, label = load_stored_clip(folder, config, device)
    clip.requires_grad_(False)
    return Encoders(TextEncoder(clip).to(device).eval(), ImageEncoder(clip.visual).to(device).eval(), label)


def _of_file(file: Path, device: torch.device | str) -> Encoders:
    if text := read_sgm(file).text:
        encoder = load_text_encoder(text, f"{file}: text encoder", device)
        return Encoders(encoder, None, f"text encoder of {file.name}")
    return Encoders(None, _image_encoder(file, device), f"image encoder of {file.name}")


def _image_encoder(path: Path, device: torch.device | str) -> ImageEncoder:
    return ImageEncoder(load_image_tower(path, device).requires_grad_(False)).to(device).eval()
