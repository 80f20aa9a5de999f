"""Conversion between Stability's single files and diffusers' folders, tensor by tensor and without loss.

A folder made from a single file holds `unet/`, `vae/`, `image_encoder/`, `scheduler/`, `feature_extractor/` and
`model_index.json`, which diffusers loads, and for what diffusers has no place: `image_vae/` (the conditioner's whole
image autoencoder) and `sgm_rest.safetensors` (leftovers of the text tower, the first stage's own encoder). The way back
uses both when they are there, so that file → folder → file gives the same tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from svd.core.errors import UserError
from svd.core.files import atomic_folder, write_json
from svd.model.autoencoder import Autoencoder
from svd.model.formats.clip import image_tower_of, image_tower_of_folder
from svd.model.formats.clip_names import to_transformers
from svd.model.formats.diffusers_configs import (
    autoencoder_from_json,
    autoencoder_to_json,
    learned_mixers,
    read_config,
    unet_from_json,
    unet_to_json,
)
from svd.model.formats.folders import (
    WEIGHTS,
    is_image_to_video,
    modern_attention_names,
    trained_frames,
    weights_file,
    write_pipeline_files,
)
from svd.model.formats.sgm import (
    SgmParts,
    Tensors,
    autoencoder_from_sgm,
    autoencoder_to_sgm,
    diffusers_autoencoder,
    first_stage_config,
    image_autoencoder_config,
    place_autoencoder,
    read_sgm,
    split,
    stored_config,
    unet_config_of_parts,
    unet_from_sgm,
    unet_to_sgm,
    write_sgm,
)
from svd.model.safetensors import check_fit, read_tensors, write_tensors
from svd.model.unet import UNet

Layout = Literal["sgm", "diffusers"]
REST = "sgm_rest.safetensors"
CLIP_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Conversion:
    """The outcome: tensors written, and the parts that the source, and so the target, lacks."""

    target: Path
    tensors: int
    missing: tuple[str, ...]


def convert_model(
    source: Path,
    target: Path,
    to: Layout,
    *,
    dtype: torch.dtype | None = None,
    sha256: str | None = None,
    frames: int | None = None,
) -> Conversion:
    """Convert a single file to a diffusers folder (`to="diffusers"`) or a folder to a single file (`to="sgm"`).

    dtype: type of the written floating tensors (None: as stored). sha256: expected hash of a single file. frames: the
    length that the U-Net was trained at, for the target's configuration (None: what the source says; of a released
    single file the name, of which `xt` stands for 25).
    Raises UserError for a source of the other kind, an existing target, and broken or unfitting files.
    """
    source, target = Path(source), Path(target)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if target.exists():
        raise UserError(f"{target}: exists already; choose another name or delete it")
    if to == "diffusers":
        if source.is_dir():
            raise UserError(
                f"{source}: a folder, so it's in diffusers' layout already; give a single .safetensors file"
            )
        return _to_folder(read_sgm(source, sha256), target, dtype, frames or trained_frames(source) or 14)
    if source.is_file():
        raise UserError(f"{source}: a single file, so it's in sgm's layout already; give a folder in diffusers' layout")
    return _to_file(source, target, dtype, frames or trained_frames(source) or 14)


def _typed(tensors: Tensors, dtype: torch.dtype | None) -> Tensors:
    if dtype is None:
        return tensors
    return {n: t.map(lambda x: x.to(dtype)) if t.dtype.is_floating_point else t for n, t in tensors.items()}


def _to_folder(parts: SgmParts, target: Path, dtype: torch.dtype | None, frames: int) -> Conversion:
    """Write beside the target and rename, so that a killed conversion leaves no half folder."""
    with atomic_folder(target) as work:
        count, missing = _write_parts(parts, work, dtype, frames)
    return Conversion(target, count, tuple(missing))


def _write_parts(parts: SgmParts, work: Path, dtype: torch.dtype | None, frames: int) -> tuple[int, list[str]]:
    """Write the parts of the file into `work`; return the number of tensors and the names of the missing parts."""
    config = unet_config_of_parts(parts)
    unet = unet_from_sgm(parts.unet, config)
    check_fit(expected(UNet, config), unet, f"{parts.source}: U-Net")
    unet, config = learned_mixers(unet, config)
    count = _write(work / "unet", unet_to_json(config, frames), unet, dtype)
    missing, image_size = [], 0
    if parts.first_stage:
        first, tensors = diffusers_autoencoder(parts)
        check_fit(expected(Autoencoder, first), tensors, f"{parts.source}: autoencoder")
        count += _write(work / "vae", autoencoder_to_json(first), tensors, dtype)
    else:
        missing.append("vae")
    clip, visual = image_tower_of(parts, f"{parts.source}: image encoder")
    if visual:
        image_size = clip["image_size"]
        count += _write(work / "image_encoder", clip, to_transformers(visual), dtype, CLIP_WEIGHTS)
    else:
        missing.append("image_encoder")
    count += _write_rest(work, parts, dtype)
    if is_image_to_video(config) and not missing:
        vae = "AutoencoderKLTemporalDecoder" if first_stage_config(parts).temporal_decoder else "AutoencoderKL"
        write_pipeline_files(work, vae, image_size)
    return count, missing


def _write(
    folder: Path, config: dict[str, Any], tensors: Tensors, dtype: torch.dtype | None, name: str = WEIGHTS
) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / name, _typed(tensors, dtype))
    write_json(folder / "config.json", config)
    return len(tensors)


def _write_rest(work: Path, parts: SgmParts, dtype: torch.dtype | None) -> int:
    """Write what diffusers has no place for: the conditioner's image autoencoder, and tensors that nothing uses."""
    count = 0
    whole = any(name.startswith("decoder.") for name in parts.image_autoencoder)
    if whole:
        image = image_autoencoder_config(parts)
        tensors = autoencoder_from_sgm(parts.image_autoencoder, image)
        count += _write(work / "image_vae", autoencoder_to_json(image), tensors, dtype)
    rest = SgmParts(text=parts.text)
    rest.clip = {name: tensor for name, tensor in parts.clip.items() if not name.startswith("visual.")}
    if parts.first_stage and first_stage_config(parts).temporal_decoder:
        rest.first_stage = {name: t for name, t in parts.first_stage.items() if name.startswith("encoder.")}
    tensors = _typed(rest.joined(), dtype)
    if tensors:
        write_tensors(work / REST, tensors, {"format": "pt", "svd.config": json.dumps(parts.config, sort_keys=True)})
    return count + len(tensors)


def _to_file(source: Path, target: Path, dtype: torch.dtype | None, frames: int) -> Conversion:
    unet = source / "unet" if (source / "unet").is_dir() else source
    config = unet_from_json(read_config(unet / "config.json"), unet / "config.json")
    tensors = read_tensors(weights_file(unet))
    check_fit(expected(UNet, config), tensors, f"{unet}: U-Net")
    tensors, config = learned_mixers(tensors, config)
    parts = SgmParts(unet=unet_to_sgm(tensors, config), config=stored_config(config, None, frames))
    missing = []
    if (source / "vae").is_dir():
        value = read_config(source / "vae" / "config.json")
        first = autoencoder_from_json(value, source / "vae" / "config.json")
        tensors = modern_attention_names(read_tensors(weights_file(source / "vae")))
        check_fit(expected(Autoencoder, first), tensors, f"{source / 'vae'}: autoencoder")
        place_autoencoder(parts, autoencoder_to_sgm(tensors, first), first)
        parts.config = stored_config(config, first, frames)
    else:
        missing.append("vae")
    if (source / "image_encoder").is_dir():
        clip, visual = image_tower_of_folder(source / "image_encoder")
        parts.clip = {f"visual.{name}": tensor for name, tensor in visual.items()}
        parts.config["clip_heads"] = clip["num_attention_heads"]
    else:
        missing.append("image_encoder")
    _read_rest(source, parts)
    for part in ("unet", "clip", "image_autoencoder", "first_stage", "text"):
        setattr(parts, part, _typed(getattr(parts, part), dtype))
    write_sgm(target, parts)
    return Conversion(target, len(parts.joined()), tuple(missing))


def expected(kind: type[UNet] | type[Autoencoder], config: Any) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a network's tensors."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in kind(config).state_dict().items()}


def _read_rest(source: Path, parts: SgmParts) -> None:
    """Put back what `_write_rest` has written."""
    if (source / "image_vae").is_dir():
        path = source / "image_vae" / "config.json"
        image = autoencoder_from_json(read_config(path), path)
        parts.image_autoencoder = autoencoder_to_sgm(read_tensors(weights_file(path.parent)), image)
    if (source / REST).is_file():
        rest, _ = split(read_tensors(source / REST))
        parts.clip |= rest.clip
        parts.text |= rest.text
        parts.first_stage |= rest.first_stage
