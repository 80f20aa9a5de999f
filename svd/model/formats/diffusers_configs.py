"""Configurations on disk: our dataclasses written as diffusers' `config.json` and read back.

A `config.json` holds diffusers' own keys, so that diffusers loads the folder, and under "svd" every field of ours,
which diffusers ignores. A folder made by diffusers has no "svd" and is read from diffusers' keys alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from pydantic import TypeAdapter, ValidationError

from svd.core.errors import UserError
from svd.model.autoencoder import AutoencoderConfig
from svd.model.layers import NORM_GROUPS
from svd.model.safetensors import Lazy
from svd.model.unet import UNetConfig

Config = TypeVar("Config")

OURS = "svd"
VERSION = "0.30.0"  # of the layout: what diffusers writes as `_diffusers_version`
RUNTIME_FIELDS = frozenset({"checkpointing"})  # how a model is run isn't a property of its weights


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raise UserError when it's missing or broken."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; the folder isn't a model in diffusers' layout")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def autoencoder_to_json(config: AutoencoderConfig, sample_size: int = 768) -> dict[str, Any]:
    """Return diffusers' configuration of an autoencoder."""
    levels = len(config.block_out_channels)
    value: dict[str, Any] = {
        "_class_name": "AutoencoderKLTemporalDecoder" if config.temporal_decoder else "AutoencoderKL",
        "_diffusers_version": VERSION,
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "out_channels": config.in_channels,
        "sample_size": sample_size,
        "scaling_factor": config.scaling_factor,
        OURS: _plain(asdict(config)),
    }
    if not config.temporal_decoder:
        value |= {
            "act_fn": "silu",
            "norm_num_groups": config.norm_groups,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
    return value


def autoencoder_from_json(value: dict[str, Any], path: Path) -> AutoencoderConfig:
    """Return our configuration; raise UserError for another class than the two autoencoders and for missing keys."""
    if OURS in value:
        return configuration(AutoencoderConfig, value[OURS], str(path))
    kind = value.get("_class_name")
    if kind not in ("AutoencoderKL", "AutoencoderKLTemporalDecoder"):
        raise UserError(
            f"{path}: '{kind}' isn't an autoencoder; expected AutoencoderKL or AutoencoderKLTemporalDecoder"
        )
    with _readable(path, "an autoencoder"):
        return AutoencoderConfig(
            in_channels=value.get("in_channels", 3),
            latent_channels=value.get("latent_channels", 4),
            block_out_channels=tuple(value["block_out_channels"]),
            layers_per_block=value.get("layers_per_block", 1),
            scaling_factor=value.get("scaling_factor", 0.18215),
            temporal_decoder=kind == "AutoencoderKLTemporalDecoder",
            norm_groups=value.get("norm_num_groups", 32),
        )


def published_frames(path: Path) -> int:
    """Return the frames that a released single file was trained on, by its name: 25 for SVD-XT, 14 for SVD."""
    return 25 if re.search(r"(?<![a-z])xt(?![a-z])", path.stem.lower()) else 14


def unet_to_json(config: UNetConfig, frames: int = 14, sample_size: int = 96) -> dict[str, Any]:
    """Return diffusers' configuration of a U-Net: spatio-temporal, or of an image model `UNet2DConditionModel`."""
    heads = [channels // config.head_channels for channels in config.block_out_channels]
    value: dict[str, Any] = {
        "_class_name": "UNetSpatioTemporalConditionModel" if config.temporal else "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "block_out_channels": list(config.block_out_channels),
        "cross_attention_dim": config.cross_attention_dim,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "out_channels": config.out_channels,
        "sample_size": sample_size,
        OURS: {k: v for k, v in _plain(asdict(config)).items() if k not in RUNTIME_FIELDS},
    }
    down, up = _block_types(config.attention_levels, "SpatioTemporal" if config.temporal else "2D")
    value |= {"down_block_types": down, "up_block_types": up}
    if not config.temporal:
        norms = {"norm_eps": config.norm_eps, "norm_num_groups": config.norm_groups}
        return value | {"attention_head_dim": heads, "use_linear_projection": True} | norms
    return value | {
        "addition_time_embed_dim": config.id_embedding_dim,
        "num_attention_heads": heads,
        "num_frames": frames,
        "projection_class_embeddings_input_dim": config.ids * config.id_embedding_dim,
        "transformer_layers_per_block": 1,
    }


def _block_types(attention: tuple[bool, ...], suffix: str) -> tuple[list[str], list[str]]:
    """Return the names of the blocks down and up, by whether a level attends."""
    names = {True: "CrossAttn", False: ""}
    down = [f"{names[level]}DownBlock{suffix}" for level in attention]
    return down, [f"{names[level]}UpBlock{suffix}" for level in reversed(attention)]


def unet_from_json(value: dict[str, Any], path: Path) -> UNetConfig:
    """Return our configuration; raise UserError for another class than the two U-Nets and for missing keys."""
    if OURS in value:
        return configuration(UNetConfig, value[OURS], str(path))
    kind = value.get("_class_name")
    if kind not in ("UNetSpatioTemporalConditionModel", "UNet2DConditionModel"):
        raise UserError(
            f"{path}: '{kind}' isn't a U-Net; expected UNetSpatioTemporalConditionModel or UNet2DConditionModel"
        )
    with _readable(path, "a U-Net"):
        return _unet_of_diffusers(value, kind == "UNetSpatioTemporalConditionModel", path)


def _unet_of_diffusers(value: dict[str, Any], temporal: bool, path: Path) -> UNetConfig:
    widths = tuple(value["block_out_channels"])
    # In UNet2DConditionModel `attention_head_dim` holds the number of heads: a known misnomer of diffusers.
    heads = value["num_attention_heads" if temporal else "attention_head_dim"]
    counts = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    sizes = {width // count for width, count in zip(widths, counts, strict=True)}
    if len(sizes) != 1:
        raise UserError(f"{path}: heads of different sizes {sorted(sizes)}; one size for all levels is supported")
    embedding = value.get("addition_time_embed_dim") or 256
    return UNetConfig(
        in_channels=value["in_channels"],
        out_channels=value["out_channels"],
        block_out_channels=widths,
        attention_levels=tuple("CrossAttn" in name for name in value["down_block_types"]),
        layers_per_block=value.get("layers_per_block", 2),
        head_channels=sizes.pop(),
        cross_attention_dim=value["cross_attention_dim"],
        id_embedding_dim=embedding,
        ids=(value["projection_class_embeddings_input_dim"] // embedding) if temporal else 0,
        temporal=temporal,
    )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def configuration(cls: type[Config], values: Any, what: str) -> Config:
    """Rebuild our configuration from its fields in JSON. what: the beginning of messages.

    Raises UserError, in one line, for what isn't an object, unknown fields, and values that are wrong or missing.
    """
    if not isinstance(values, dict):
        raise UserError(f"{what}: expected an object with the fields of {cls.__name__}")
    unknown = sorted(set(values) - {field.name for field in fields(cast(Any, cls))})
    if unknown:
        raise UserError(f"{what}: unknown {cls.__name__} field(s) {', '.join(unknown)}; written by a newer version?")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{what}: {place + ': ' if place else ''}{first['msg']}") from None


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Turn the errors that odd values cause in reading diffusers' keys into one line."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not the configuration of {kind} ({error})") from None


def learned_mixers(tensors: Mapping[str, Lazy], config: UNetConfig) -> tuple[dict[str, Lazy], UNetConfig]:
    """Convert fixed mixers to learned ones, because released layouts know no others: α is stored as its logit.

    Other U-Nets are returned as they are. Raises UserError for one that normalises in other than 32 groups: nothing in
    a released layout would say so.
    """
    if config.norm_groups != NORM_GROUPS:
        raise UserError(
            f"released layouts normalise the U-Net in {NORM_GROUPS} groups, this one has {config.norm_groups}; train "
            "with 'model.unet.norm_groups: 32' what others shall read"
        )
    if config.mixer != "fixed":
        return dict(tensors), config
    logit = {name: tensor.map(torch.logit) for name, tensor in tensors.items() if name.endswith("mix_factor")}
    return {**tensors, **logit}, replace(config, mixer="learned")


def scheduler_json() -> dict[str, Any]:
    """Return diffusers' EulerDiscreteScheduler with the released values (σ from 700 to 0.002, continuous ¼ ln σ)."""
    return {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": VERSION,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "sigma_max": 700.0,
        "sigma_min": 0.002,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "timestep_type": "continuous",
        "trained_betas": None,
        "use_karras_sigmas": True,
    }


def model_index_json(vae: str = "AutoencoderKLTemporalDecoder") -> dict[str, Any]:
    """Return the parts of a StableVideoDiffusionPipeline; `vae` is the autoencoder's class."""
    return {
        "_class_name": "StableVideoDiffusionPipeline",
        "_diffusers_version": VERSION,
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
        "vae": ["diffusers", vae],
    }


def image_processor_json(size: int = 224) -> dict[str, Any]:
    """Return CLIPImageProcessor with OpenAI's statistics (the pipeline resizes and normalises by itself with them)."""
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": size},
    }


def image_encoder_json(
    width: int, layers: int, heads: int, mlp: int, patch: int, size: int, projection: int
) -> dict[str, Any]:
    """Return CLIPVisionModelWithProjection's configuration; ViT-H/14: 1280, 32, 16, 5120, 14, 224, 1024."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": width,
        "image_size": size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": heads,
        "num_channels": 3,
        "num_hidden_layers": layers,
        "patch_size": patch,
        "projection_dim": projection,
    }
