"""CLIP models of open_clip: the toy one that this project trains, and released weights by hub name or file.

A folder of a stored CLIP holds `open_clip_config.json` and `model.safetensors`; `reference.json` says what it is:
`{"kind": "toy-clip"}`, or for released weights their name, so that a stage's output needn't copy gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transformer import VisionTransformer

from svd.config import EncodersConfig
from svd.core.errors import UserError
from svd.core.files import write_json
from svd.model.formats.clip_names import to_open_clip, transformers_config
from svd.model.formats.folders import IMAGE_PART, TEXT_PART, weights_file
from svd.model.formats.sgm import SgmParts, one_line_errors, read_sgm
from svd.model.safetensors import Lazy, check_fit, fill, of_module, read_tensors, write_tensors

WEIGHTS = "model.safetensors"
CONFIG = "open_clip_config.json"
REFERENCE = "reference.json"

_TOY_IMAGE = 64
_TOY_PATCH = 8
_TOY_LAYERS = 3
_TOY_HEAD = 16


def toy_config(width: int, embedding: int, tokens: int = 77) -> dict[str, Any]:
    """Return open_clip's configuration of the toy CLIP: 64 x 64 images in patches of 8, three layers in each tower.

    width: of the image tower. embedding: size of the joint space and width of the text tower, so that text tokens
    and image embeddings both fit a U-Net with this cross-attention width. tokens: length of a text, start and end
    included; longer ones are cut. Raises UserError unless both widths are multiples of 16.
    """
    if width % _TOY_HEAD or embedding % _TOY_HEAD:
        raise UserError(
            f"encoders.toy_width ({width}) and model.unet.cross_attention_dim ({embedding}) must be multiples of "
            f"{_TOY_HEAD} for the toy-clip encoders"
        )
    return {
        "embed_dim": embedding,
        "vision_cfg": {
            "image_size": _TOY_IMAGE,
            "layers": _TOY_LAYERS,
            "width": width,
            "head_width": _TOY_HEAD,
            "patch_size": _TOY_PATCH,
        },
        "text_cfg": {
            "context_length": tokens,
            "vocab_size": 49408,
            "width": embedding,
            "heads": embedding // _TOY_HEAD,
            "layers": _TOY_LAYERS,
        },
    }


def build_clip(config: dict[str, Any], source: str) -> open_clip.CLIP:
    """Build a CLIP with fresh weights.

    Raises UserError, which begins with `source`, for architectures without CLIP's own text tower.
    """
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys() or "hf_model_name" in config["text_cfg"]:
        raise UserError(f"{source}: not a CLIP with its own text transformer; use a model such as ViT-H-14 or ViT-L-14")
    try:
        model = open_clip.CLIP(
            embed_dim=config["embed_dim"],
            vision_cfg=open_clip.CLIPVisionCfg(**config["vision_cfg"]),
            text_cfg=open_clip.CLIPTextCfg(**config["text_cfg"]),
            quick_gelu=config.get("quick_gelu", False),
        )
    except (TypeError, ValueError, AttributeError, AssertionError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"{source}: no CLIP can be built as it says ({str(error).splitlines()[0]})") from None
    if model.text_pool_type != "argmax" or model.attn_mask is None:
        raise UserError(f"{source}: the text tower isn't CLIP's (causal, read at the end token)")
    return model


def save_toy(clip: open_clip.CLIP, config: dict[str, Any], folder: Path) -> None:
    """Write a CLIP trained here; equal weights give equal bytes. open_clip loads the folder as `local-dir:<folder>`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, of_module(clip))
    preprocess = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    write_json(folder / CONFIG, {"model_cfg": config, "preprocess_cfg": preprocess})
    write_json(folder / REFERENCE, {"kind": "toy-clip"})


def save_reference(config: EncodersConfig, folder: Path) -> None:
    """Write which released weights to use, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"kind": config.kind, "model": config.model, "weights": config.weights, "sha256": config.sha256}
    write_json(folder / REFERENCE, values)


def load_stored_clip(
    folder: Path, config: EncodersConfig, device: torch.device | str = "cpu"
) -> tuple[open_clip.CLIP, str]:
    """Load the CLIP that the stage `encoders` left in `folder`; return it and its label for reports.

    Raises UserError when the folder is no output of that stage, or when released weights can't be had.
    """
    other = f"or give a released model's folder with {IMAGE_PART}/ or {TEXT_PART}/ in it"
    reference = _read_json(folder / REFERENCE, f"run the stage 'encoders' first, {other}")
    kind = reference.get("kind")
    if kind != config.kind:
        raise UserError(f"{folder / REFERENCE}: encoders of kind '{kind}', the preset wants '{config.kind}'")
    if config.kind == "open_clip":
        return load_released(config, device), f"{config.model}/{config.weights}"
    model_config = _read_json(folder / CONFIG).get("model_cfg", {})
    clip = build_clip(model_config, str(folder / CONFIG))
    fill(clip, read_tensors(folder / WEIGHTS), f"{folder} doesn't fit its {CONFIG}", device)
    return clip.to(device).eval(), "toy-clip"


def load_image_tower(path: Path, device: torch.device | str = "cpu") -> VisionTransformer:
    """Load open_clip's image tower, float32.

    path: a folder in transformers' layout (CLIPVisionModelWithProjection), or a single file in Stability's layout.

    Raises UserError for missing, broken and unfitting files.
    """
    if path.is_file():
        what = f"{path}: image encoder"
        config, tensors = image_tower_of(read_sgm(path), what)
        if not tensors:
            raise UserError(f"{path}: no image encoder in this file; give one with --encoders")
    else:
        what = f"{path} doesn't fit its config.json"
        config, tensors = image_tower_of_folder(path)
    tower = _image_tower(config)
    fill(tower, tensors, what, device, torch.float32)
    return tower.eval()


def image_tower_of(parts: SgmParts, what: str) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """Return the image tower of a file: transformers' configuration and open_clip's tensors; both empty without one.

    what: the beginning of messages. Raises UserError for missing, unexpected and misshaped tensors.
    """
    tensors = {n.removeprefix("visual."): t for n, t in parts.clip.items() if n.startswith("visual.")}
    if not tensors:
        return {}, {}
    with one_line_errors(what):
        config = transformers_config(tensors, parts.config.get("clip_heads"))
    check_fit(_shapes(config), tensors, what)
    return config, tensors


def image_tower_of_folder(path: Path) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """Do as `image_tower_of` for a folder in transformers' layout (CLIPVisionModelWithProjection)."""
    config = tower_config(path, "CLIPVisionModelWithProjection", "image_size", "patch_size", "projection_dim")
    tensors = to_open_clip(read_tensors(weights_file(path, "model")), str(path))
    check_fit(_shapes(config), tensors, f"{path} doesn't fit its config.json")
    return config, tensors


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in _image_tower(config).state_dict().items()}


def tower_config(path: Path, kind: str, *names: str) -> dict[str, Any]:
    """Read transformers' `config.json` of a CLIP tower.

    kind: transformers' class, for the message. names: sizes that this tower has beside those of both towers. Raises
    UserError for sizes that are missing or impossible.
    """
    file = path / "config.json"
    config = _read_json(file, f"give a folder with a {kind}")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", *names)
    bad = [name for name in sizes if type(config.get(name)) is not int or config[name] < 1]
    if bad:
        raise UserError(f"{file}: {', '.join(bad)} missing or no number")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UserError(f"{file}: hidden_size {config['hidden_size']} isn't a multiple of num_attention_heads")
    if config.get("hidden_act") != "gelu":
        raise UserError(f"{file}: hidden_act '{config.get('hidden_act')}', the encoders of SVD and SD 2.1 have 'gelu'")
    return config


def _image_tower(config: Mapping[str, Any]) -> VisionTransformer:
    """Build the tower of a configuration of transformers, without weights."""
    with torch.device("meta"):
        return VisionTransformer(
            config["image_size"],
            config["patch_size"],
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config["intermediate_size"] / config["hidden_size"],
            output_dim=config["projection_dim"],
        )


def load_released(config: EncodersConfig, device: torch.device | str = "cpu") -> open_clip.CLIP:
    """Load released open_clip weights: `config.weights` is a local .safetensors file or one of open_clip's names (hub).

    Raises UserError for unknown models and names, a wrong sha256, pickled files, and when the hub can't be reached.
    """
    architecture = open_clip.get_model_config(config.model)
    if architecture is None:
        raise UserError(f"encoders.model: open_clip knows no model '{config.model}' (for SVD: ViT-H-14)")
    path = released_file(config)
    clip = build_clip(architecture, f"encoders.model {config.model}")
    fill(
        clip, read_tensors(path, config.sha256), f"{path} doesn't fit open_clip's {config.model}", device, torch.float32
    )
    return clip.to(device).eval()


def released_file(config: EncodersConfig) -> Path:
    """Return the weights file; a name in `config.weights` is downloaded into the hub's cache."""
    path = Path(config.weights)
    if path.suffix or path.is_file():
        return path
    hub = (get_pretrained_cfg(config.model, config.weights) or {}).get("hf_hub", "").strip("/")
    if not hub:
        raise UserError(
            f"encoders.weights: '{config.weights}' is no .safetensors file and no hub weights of {config.model}; "
            f"open_clip has {', '.join(open_clip.list_pretrained_tags_by_model(config.model)) or 'none'}"
        )
    return _download(hub)


def _download(hub: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub, HF_SAFE_WEIGHTS_NAME))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{HF_SAFE_WEIGHTS_NAME} of {hub} can't be downloaded ({type(error).__name__}); get it from "
            f"https://huggingface.co/{hub} and give its path in encoders.weights"
        ) from None


def _read_json(path: Path, advice: str = "run the stage 'encoders' first") -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {advice}") from None
    except ValueError:
        raise UserError(f"{path}: not valid JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
