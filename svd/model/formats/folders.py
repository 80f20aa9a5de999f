"""Models in folders: U-Net and autoencoder saved and loaded in diffusers' layout, strictly and tensor by tensor.

`<folder>/config.json` and `<folder>/diffusion_pytorch_model.safetensors` (or its shards); a pipeline folder holds such
folders as `unet/`, `vae/`, … with `model_index.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from svd.core.errors import UserError
from svd.core.files import write_json
from svd.model.autoencoder import Autoencoder
from svd.model.formats.clip_names import to_transformers, transformers_config
from svd.model.formats.diffusers_configs import (
    OURS,
    autoencoder_from_json,
    autoencoder_to_json,
    image_processor_json,
    learned_mixers,
    model_index_json,
    published_frames,
    read_config,
    scheduler_json,
    unet_from_json,
    unet_to_json,
)
from svd.model.formats.sgm import build_autoencoder, build_unet, read_sgm, stored_facts
from svd.model.safetensors import Lazy, file_hash, fill, of_module, read_header, read_tensors, write_tensors
from svd.model.unet import UNet, UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
ENCODERS = IMAGE_PART, TEXT_PART = "image_encoder", "text_encoder"  # folders of a pipeline


def weights_file(folder: Path, stem: str = "diffusion_pytorch_model") -> Path:
    """Return the weights in a folder: the full file, the index of its shards, or the fp16 variant, in this order.

    Raises UserError that says what the folder lacks; a pickled `.bin` is named and refused.
    """
    names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}.fp16.safetensors")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    if (folder / f"{stem}.bin").is_file():
        raise UserError(f"{folder / stem}.bin: pickled checkpoints can run code and are refused; get {names[0]}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a model in diffusers' layout")
    raise UserError(f"{folder}: no {names[0]} in this folder")


def save_autoencoder(autoencoder: Autoencoder, folder: Path) -> None:
    """Write the autoencoder in diffusers' layout; equal weights give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, of_module(autoencoder))
    write_json(folder / "config.json", autoencoder_to_json(autoencoder.config))


def load_autoencoder(
    folder_or_file: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Autoencoder:
    """Load an autoencoder from diffusers' layout or a single sgm file.

    The class is `AutoencoderKL` or `AutoencoderKLTemporalDecoder`; of a pipeline folder, `vae/` is taken. dtype: None
    keeps the stored type. Raises UserError for missing, broken and unfitting files.
    """
    if Path(folder_or_file).is_file():
        return build_autoencoder(read_sgm(Path(folder_or_file)), Path(folder_or_file), device, dtype)
    folder = part_of(Path(folder_or_file), "vae")
    config = autoencoder_from_json(read_config(folder / "config.json"), folder / "config.json")
    tensors = modern_attention_names(read_tensors(weights_file(folder)))
    with torch.device("meta"):
        autoencoder = Autoencoder(config)
    fill(autoencoder, tensors, f"{folder} doesn't fit its config.json", device, dtype)
    return autoencoder.eval()


def part_of(folder: Path, part: str) -> Path:
    """Return `folder/part` when `folder` is a whole pipeline, else `folder`."""
    return folder / part if (folder / part / "config.json").is_file() else folder


def is_released(model: Path) -> bool:
    """Return whether this is a released model, not one trained here.

    That is a single file, the folder of a pipeline, or a folder with a U-Net that diffusers has written.
    """
    if model.is_file() or (model / "model_index.json").is_file():
        return True
    path = part_of(model, "unet") / "config.json"
    config = read_config(path) if path.is_file() else {}
    return OURS not in config and str(config.get("_class_name")).startswith("UNet")


def bundled(model: Path | None, *parts: str) -> Path | None:
    """Return the model itself when it brings one of these parts: a single file, or a folder that has them."""
    if model is None or not (model.is_file() or any((model / part / "config.json").is_file() for part in parts)):
        return None
    return model


def modern_attention_names(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Rename the attention's layers of old autoencoder folders (SD 1 and 2): query, key, value and proj_attn."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed: dict[str, Lazy] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if "attentions" in parts and parts[-2] in names:
            parts[-2] = names[parts[-2]]
            if len(tensor.shape) == 4:
                tensor = tensor.map(lambda t: t[:, :, 0, 0])
        renamed[".".join(parts)] = tensor
    return renamed


def trained_frames(folder_or_file: Path) -> int | None:
    """Return the frames per clip that a U-Net was trained on, None where nothing says so.

    A folder's config.json says it, a single file's metadata when it is ours, else its published name.
    """
    if not folder_or_file.is_file():
        config = read_config(part_of(folder_or_file, "unet") / "config.json")
        return 1 if config.get("_class_name") == "UNet2DConditionModel" else config.get("num_frames")
    if not any(".time_stack." in name for name in read_header(folder_or_file)):
        return 1
    return stored_facts(folder_or_file).get("frames") or published_frames(folder_or_file)


def published_clip(model: Path) -> tuple[int, int, int]:
    """Return the frames, height and width of a released model's training: 576 x 1024; of an image model a square."""
    frames = trained_frames(model) or 14
    if frames > 1:
        return frames, 576, 1024
    if model.is_file():  # v2-1_512-ema-pruned and v2-1_768-ema-pruned
        side = 512 if "512" in model.stem else 768
    else:
        side = 8 * read_config(part_of(model, "unet") / "config.json").get("sample_size", 96)
    return frames, side, side


def save_unet(unet: UNet, folder: Path, frames: int = 14) -> None:
    """Write the U-Net in diffusers' layout; `frames` is the default length that diffusers reads from the config.

    Fixed mixers stay fixed, which diffusers doesn't know: `save_pipeline` writes those for it.
    """
    _write_unet(of_module(unet), unet.config, folder, frames)


def _write_unet(tensors: Mapping[str, Lazy], config: UNetConfig, folder: Path, frames: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / "config.json", unet_to_json(config, frames))


def load_unet(folder_or_file: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> UNet:
    """Load a U-Net from diffusers' layout or a single sgm file.

    The class is `UNetSpatioTemporalConditionModel` or `UNet2DConditionModel`; of a pipeline folder, `unet/` is taken.
    dtype: None keeps the stored type. Raises UserError for missing, broken and unfitting files.
    """
    if Path(folder_or_file).is_file():
        return build_unet(read_sgm(Path(folder_or_file)), Path(folder_or_file), device, dtype)
    folder = part_of(Path(folder_or_file), "unet")
    config = unet_from_json(read_config(folder / "config.json"), folder / "config.json")
    tensors = read_tensors(weights_file(folder))
    with torch.device("meta"):
        unet = UNet(config)
    fill(unet, tensors, f"{folder} doesn't fit its config.json", device, dtype)
    return unet.eval()


def checkpoint_hash(folder: Path) -> str:
    """Return the SHA-256 over the configs and weights of a folder (names and contents), the identity of a model."""
    digest = hashlib.sha256()
    files = sorted(p for p in folder.rglob("*") if p.name == "config.json" or p.suffix == ".safetensors")
    if not files:
        raise UserError(f"{folder}: no config.json and no .safetensors; not a model folder")
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n".encode())
    return digest.hexdigest()


def is_image_to_video(config: UNetConfig) -> bool:
    """Return whether diffusers' StableVideoDiffusionPipeline can drive this U-Net."""
    return config.in_channels == 2 * config.out_channels and config.ids == 3 and config.temporal


def save_pipeline(
    folder: Path, unet: UNet, autoencoder: Autoencoder, visual: nn.Module, heads: int, frames: int = 14
) -> None:
    """Write a folder that diffusers loads as StableVideoDiffusionPipeline: an image-to-video model with its parts.

    visual: open_clip's visual tower; heads: its number of heads; frames: what the U-Net was trained on. Raises
    UserError unless the U-Net takes twice the latent's channels and three conditioning ids, and the autoencoder has the
    temporal decoder: others have no pipeline there.
    """
    config = unet.config
    if autoencoder.config.norm_groups != 32:
        raise UserError(
            f"diffusers normalises the autoencoder in 32 groups, this one has "
            f"{autoencoder.config.norm_groups}; save its parts instead"
        )
    if not is_image_to_video(config) or not autoencoder.config.temporal_decoder:
        raise UserError(
            f"diffusers has a pipeline for image-to-video models alone (8 input channels, 3 ids, temporal "
            f"decoder); this model has {config.in_channels} channels and {config.ids} ids; save its parts instead"
        )
    _write_unet(*learned_mixers(of_module(unet), config), folder / "unet", frames)
    save_autoencoder(autoencoder, folder / "vae")
    tensors = of_module(visual)
    value = transformers_config(tensors, heads)
    (folder / "image_encoder").mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "image_encoder" / "model.safetensors", to_transformers(tensors))
    write_json(folder / "image_encoder" / "config.json", value)
    write_pipeline_files(folder, image_size=value["image_size"])


def write_pipeline_files(folder: Path, vae: str = "AutoencoderKLTemporalDecoder", image_size: int = 224) -> None:
    """Write a pipeline folder's files beside its models: `model_index.json`, `scheduler/`, `feature_extractor/`."""
    for name in ("scheduler", "feature_extractor"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_json())
    write_json(folder / "feature_extractor" / "preprocessor_config.json", image_processor_json(image_size))
    write_json(folder / "model_index.json", model_index_json(vae))
