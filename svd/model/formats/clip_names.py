"""The encoders' tensors in open_clip's form (sgm's files) and in transformers': CLIPVisionModelWithProjection, and
CLIPTextModel, which is read only.

open_clip stacks the q, k and v projections (3C, C) and multiplies features by `proj` (C, E); transformers has three
projections and a linear layer `visual_projection` (E, C). Everything else maps one to one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from svd.core.errors import UserError
from svd.model.formats.diffusers_configs import image_encoder_json
from svd.model.safetensors import Lazy

ENDS = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}
TEXT_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
HEAD_CHANNELS = {1280: 80, 1024: 64, 768: 64, 1664: 104, 1408: 88}  # ViT-H, L, B, bigG, g of open_clip


def to_transformers(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Convert open_clip's visual tower (without `visual.`) to transformers' names; UserError for other names."""
    found: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        if name == "proj":
            found["visual_projection.weight"] = tensor.map(lambda t: t.t())
        elif name in ENDS:
            found[ENDS[name]] = tensor
        else:
            found |= _layer_to_transformers(name, tensor)
    return found


def _layer_to_transformers(name: str, tensor: Lazy) -> dict[str, Lazy]:
    match = re.match(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)$", name)
    if match is None or match[2] not in (*LAYER, "attn.in_proj"):
        raise UserError(f"'{name}' isn't a tensor of an open_clip vision transformer")
    prefix, part, leaf = f"vision_model.encoder.layers.{match[1]}", match[2], match[3]
    if part != "attn.in_proj":
        return {f"{prefix}.{LAYER[part]}.{leaf}": tensor}
    return {
        f"{prefix}.self_attn.{projection}.{leaf}": tensor.map(lambda t, i=i: t.chunk(3)[i])  # type: ignore[misc]
        for i, projection in enumerate(PROJECTIONS)
    }


def to_open_clip(tensors: Mapping[str, Lazy], what: str) -> dict[str, Lazy]:
    """Convert CLIPVisionModelWithProjection to open_clip's visual tower; UserError for other names, lone projections.

    what: the file or folder, the beginning of messages.
    """
    own = {name: tensor for name, tensor in tensors.items() if name != "visual_projection.weight"}
    found = _to_open_clip(own, ENDS, "vision_model.", "CLIPVisionModelWithProjection", what)
    if "visual_projection.weight" in tensors:
        projection = tensors["visual_projection.weight"]
        found["proj"] = projection.map(lambda t: t.t()) if len(projection.shape) == 2 else projection
    return found


def text_to_open_clip(tensors: Mapping[str, Lazy], what: str) -> dict[str, Lazy]:
    """Convert CLIPTextModel to open_clip's text tower without the projection, which it lacks; errors: `to_open_clip`.

    Published files have all names under `text_model.`, those that transformers 5 writes have no prefix.
    """
    own = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return _to_open_clip(own, TEXT_ENDS, "", "CLIPTextModel", what)


def _to_open_clip(
    tensors: Mapping[str, Lazy], names: Mapping[str, str], prefix: str, kind: str, what: str
) -> dict[str, Lazy]:
    """Convert either tower; names: those outside of the layers, whose names begin with `prefix`."""
    ends = {theirs: ours for ours, theirs in names.items()}
    layers = {theirs: ours for ours, theirs in LAYER.items()}
    found: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        if name in ends:
            found[ends[name]] = tensor
        elif name != f"{prefix}embeddings.position_ids":  # a counter that old versions of transformers stored
            match = re.match(re.escape(prefix) + r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", name)
            if match is None or match[2] not in (*layers, *(f"self_attn.{p}" for p in PROJECTIONS)):
                raise UserError(f"{what}: '{name}' isn't a tensor of {kind}")
            place = f"transformer.resblocks.{match[1]}"
            if match[2] in layers:
                found[f"{place}.{layers[match[2]]}.{match[3]}"] = tensor
            elif match[2].endswith("q_proj"):
                found[f"{place}.attn.in_proj_{match[3]}"] = _stacked(tensors, name, what)
    return found


def _stacked(tensors: Mapping[str, Lazy], name: str, what: str) -> Lazy:
    """Stack the q, k and v projections below each other; `name` is q's."""
    names = [name.replace("q_proj", projection) for projection in PROJECTIONS]
    if missing := [other for other in names if other not in tensors]:
        raise UserError(f"{what}: '{missing[0]}' is missing beside '{name}'")
    parts = [tensors[other] for other in names]
    first = parts[0].shape
    if not first or any(part.shape != first for part in parts):
        raise UserError(f"{what}: '{name}' and the projections beside it differ in shape")
    return Lazy((len(parts) * first[0], *first[1:]), parts[0].dtype, lambda: torch.cat([part.load() for part in parts]))


def transformers_config(tensors: Mapping[str, Lazy], heads: int | None = None) -> dict[str, Any]:
    """Derive the configuration of CLIPVisionModelWithProjection from the shapes of open_clip's visual tower.

    heads: when not given, width over the head size of open_clip's model of that width. Raises KeyError for a missing
    tensor, and ValueError for shapes that no tower has and for an unknown number of heads.
    """
    width, _, patch, _ = tensors["conv1.weight"].shape
    if heads is None:
        if width not in HEAD_CHANNELS:
            raise ValueError(f"a width of {width} is none of open_clip's, so the number of heads is unknown")
        heads = width // HEAD_CHANNELS[width]
    if width % heads:
        raise ValueError(f"a width of {width} can't have {heads} heads")
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")}
    tokens = tensors["positional_embedding"].shape[0]
    return image_encoder_json(
        width=width,
        layers=len(layers),
        heads=heads,
        mlp=tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        patch=patch,
        size=patch * round((tokens - 1) ** 0.5),
        projection=tensors["proj"].shape[1],
    )
