"""Low-rank adapters on the temporal attention, through peft (§4.3.1, D.4.2).

Adapters are stored as peft folders (`adapter_config.json`, `adapter_model.safetensors`). Module names are those of
diffusers, so the same folder loads into the released pipeline:

    from diffusers import StableVideoDiffusionPipeline
    from peft import PeftModel

    pipeline = StableVideoDiffusionPipeline.from_pretrained("stabilityai/stable-video-diffusion-img2vid")
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, "outputs/camera-lora/zoom").merge_and_unload()
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svd.core.errors import UserError
from svd.core.files import atomic_folder
from svd.model.unet import UNet

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# peft's own name of the model inside a PeftModel: the prefix of every key in an adapter file.
PREFIX = "base_model.model."


def targets(context_tokens: int) -> str:
    """Return the pattern of the linear layers to adapt: temporal self- and cross-attention.

    With one context token the queries and keys of cross-attention have no effect on the output (softmax over one key is
    1): an adapter there would never learn, so there is none.
    """
    cross = "v" if context_tokens == 1 else "[qkv]"
    return rf".*temporal_transformer_blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|attn2\.(to_{cross}|to_out\.0))"


def layers(unet: UNet) -> Iterator[LoraLayer]:
    """Yield the adapted layers of a U-Net."""
    return (module for module in unet.modules() if isinstance(module, LoraLayer))


def adapters(unet: UNet) -> list[str]:
    """Return the names of the adapters in a U-Net, in the order in which they were added."""
    first = next(layers(unet), None)
    return list(first.lora_A) if first is not None else []


def add_lora(unet: UNet, rank: int, alpha: float, name: str, *, context_tokens: int = 1) -> None:
    """Add a new adapter that changes nothing yet and is the only trainable part and the only active adapter.

    Its effect is alpha / rank · B·A. `context_tokens` is 1 for models that are conditioned on one image. Raises
    ValueError for a name in use, and for a U-Net without temporal layers.
    """
    if name in adapters(unet):
        raise ValueError(f"the U-Net already has an adapter '{name}'")
    if not unet.config.temporal:
        raise ValueError("an image model has no temporal attention to adapt")
    _inject(unet, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets(context_tokens)), name)
    for layer in layers(unet):
        layer.set_adapter(name)


def _inject(unet: UNet, config: LoraConfig, name: str, state: dict[str, Tensor] | None = None) -> None:
    """Add adapters to the layers that `config` names, or to exactly those of `state`; all of them become active."""
    present = adapters(unet)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, unet, name, state_dict=state)
    for layer in layers(unet):
        layer.set_adapter([*present, name], inference_mode=True)


def set_scales(unet: UNet, scales: Mapping[str, float]) -> None:
    """Activate exactly the adapters of `scales`, each times its scale (1: as trained), for inference.

    Raises ValueError for an unknown name and when adapters are merged into the weights.
    """
    unknown = set(scales) - set(adapters(unet))
    if unknown:
        raise ValueError(f"no adapter {sorted(unknown)}; the U-Net has {adapters(unet)}")
    if any(layer.merged for layer in layers(unet)):
        raise ValueError("adapters are merged into the weights: unmerge them before changing scales")
    for layer in layers(unet):
        layer.set_adapter(list(scales), inference_mode=True)
        for name, scale in scales.items():
            layer.set_scale(name, scale)


def merge_adapters(unet: UNet) -> None:
    """Add the active adapters to the weights: the same output (up to rounding) at no cost per step."""
    with torch.no_grad():
        for layer in layers(unet):
            layer.merge()


def unmerge_adapters(unet: UNet) -> None:
    """Subtract merged adapters from the weights again (up to rounding)."""
    with torch.no_grad():
        for layer in layers(unet):
            layer.unmerge()


def remove_lora(unet: UNet) -> None:
    """Drop all adapters and keep the weights as they are: merged adapters stay in, others are lost.

    Afterwards the U-Net has its original state-dict names again.
    """
    adapted = {name for name, module in unet.named_modules() if isinstance(module, LoraLayer)}
    for name in adapted:
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, unet.get_submodule(name).get_base_layer())
    if adapted:
        del unet.peft_config


def save_lora(unet: UNet, folder: Path, name: str) -> None:
    """Write one adapter as a peft folder, atomically (a new folder takes the place of the old one).

    Raises ValueError for an unknown name.
    """
    if name not in adapters(unet):
        raise ValueError(f"no adapter '{name}'; the U-Net has {adapters(unet)}")
    state = get_peft_model_state_dict(unet, adapter_name=name)
    tensors = {PREFIX + key: value.detach().contiguous().cpu() for key, value in sorted(state.items())}
    config = unet.peft_config[name].to_dict()
    config.update(inference_mode=True, peft_type="LORA")
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    for file in (folder / CONFIG, folder / WEIGHTS):
        if not file.is_file():
            raise UserError(f"{file}: missing; a LoRA is a peft folder with {CONFIG} and {WEIGHTS}")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, json.JSONDecodeError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: not a readable peft LoRA ({' '.join(str(error).split())})") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder / CONFIG}: peft_type is not LORA")
    return config, {key.removeprefix(PREFIX): value for key, value in state.items()}


def load_lora(unet: UNet, folder: Path, name: str) -> None:
    """Add the adapter of a peft folder under `name`, active beside those already there, frozen.

    Raises UserError when files are missing, broken, or belong to a U-Net of other sizes; ValueError for a name in use.
    """
    if name in adapters(unet):
        raise ValueError(f"the U-Net already has an adapter '{name}'")
    config, state = _read(folder)
    _check_fit(unet, config, state, folder)
    _inject(unet, config, name, state)
    set_peft_model_state_dict(unet, state, adapter_name=name)


def _check_fit(unet: UNet, config: LoraConfig, state: Mapping[str, Tensor], folder: Path) -> None:
    """Compare the file with the layers that it is for, before the U-Net is changed."""
    if not state:
        raise UserError(f"{folder / WEIGHTS}: holds no adapter weights")
    for layer in sorted({key.rpartition(".lora_")[0] for key in state}):
        base = _linear(unet, layer)
        if base is None:
            raise UserError(f"{folder}: adapts '{layer}', which is not a linear layer of this U-Net")
        out_features, in_features = base.weight.shape
        for part, shape in (("A", (config.r, in_features)), ("B", (out_features, config.r))):
            tensor = state.get(f"{layer}.lora_{part}.weight")
            if tensor is None or tuple(tensor.shape) != shape:
                found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                raise UserError(f"{folder}: lora_{part} of '{layer}' is {found}, this U-Net needs {shape}")


def _linear(unet: UNet, name: str) -> nn.Linear | None:
    module = dict(unet.named_modules()).get(name)
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return base if isinstance(base, nn.Linear) else None
