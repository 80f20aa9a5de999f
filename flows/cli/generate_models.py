"""The networks of `svd generate`: where they are, how they are opened, and what follows from a released model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli.generate_options import Dtype, Networks, Size, Solving
from flows.places import OUTPUTS
from svd.config import Phase, Preset, Sampling
from svd.core.device import pick_device
from svd.core.errors import UserError

if TYPE_CHECKING:
    from svd.generation import Models
    from svd.tasks.base import Task


def fetched(networks: Networks, encoder: str) -> Networks:
    """Replace a hub's repository (owner/name) in `--model` by its folder, with the files that no other option gives.

    encoder: the part of a pipeline that the task needs beside U-Net and autoencoder. Raises UserError when `--model` is
    neither a path nor such a repository.
    """
    model = networks.model
    if model is None or model.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)):
        return networks
    from svd.model.formats.hub import UNET_FILES, VAE_FILES, resolve_weights

    files = [*UNET_FILES]
    if networks.autoencoder is None:
        files += VAE_FILES
    if networks.encoders is None:
        files += [f"{encoder}/config.json", f"{encoder}/model.safetensors"]
    small_first = sorted(files, key=lambda name: name.endswith(".safetensors"))
    try:
        return dataclasses.replace(networks, model=resolve_weights(str(model), small_first))
    except UserError as error:
        raise UserError(f"--model {model}: no such file or folder, and as a repository of the hub: {error}") from None


def located(networks: Networks, preset: Preset, stage: str) -> Networks:
    """Fill in every option left open: paths, device, dtype, and a scale for every LoRA.

    Without `--model` that is the output of the preset's `stage`. Raises UserError for a model without U-Net, and for a
    released one that lacks a part which no option gives.
    """
    from svd.model.formats.folders import ENCODERS, bundled

    root, model = OUTPUTS / preset.name, networks.model
    _check_parts(networks)
    device, dtype = _device_and_dtype(networks)
    return dataclasses.replace(
        networks,
        model=model or root / stage / "unet",
        autoencoder=networks.autoencoder or bundled(model, "vae") or root / "autoencoder",
        encoders=networks.encoders or bundled(model, *ENCODERS) or root / "encoders",
        lora=[f"{folder}:{scale}" for folder, scale in _lora_scales(networks.lora or [])] or None,
        device=device,
        dtype=dtype,
    )


def _check_parts(networks: Networks) -> None:
    """Raise UserError for a model without U-Net, and for a released one without a part that no option gives.

    The preset's networks are no substitute for a released model's.
    """
    from svd.model.formats.folders import ENCODERS, bundled, is_released, part_of

    model = networks.model
    if model is None or not model.is_dir():
        return
    if not (part_of(model, "unet") / "config.json").is_file():
        raise UserError(f"{model}/config.json: no such file, nor unet/config.json: there is no U-Net in this folder")
    if not is_released(model):
        return
    if not (networks.autoencoder or bundled(model, "vae")):
        raise UserError(f"{model}: no vae/ in this folder; give the autoencoder with --autoencoder")
    if not (networks.encoders or bundled(model, *ENCODERS)):
        raise UserError(f"{model}: no {'/ or '.join(ENCODERS)}/ in this folder; give the encoders with --encoders")


def open_models(networks: Networks, preset: Preset, stage: str, phase: Phase) -> Models:
    """Load the networks of options that are `located`; `phase` is the last one of the preset's stage.

    Raises UserError when there is no such model, and for everything that svd.generation.load_models refuses.
    """
    import torch

    from svd.diffusion.edm import KINDS
    from svd.generation import load_models
    from svd.model.formats.folders import is_released

    model, autoencoder, encoders = networks.model, networks.autoencoder, networks.encoders
    assert model is not None and autoencoder is not None and encoders is not None
    if not model.exists():
        raise UserError(f"{model}: no such model; run `svd stage {stage} -p {networks.preset}`, or give --model")
    models = load_models(
        model,
        autoencoder,
        encoders,
        preset.encoders,
        networks.device,
        dtype=getattr(torch, networks.dtype),
        offload=networks.offload,
        kind=KINDS[networks.objective],
    )
    _apply_loras(models, networks.lora or [])
    if networks.compile:
        models.unet.compile_blocks()
    if is_released(model) or model == OUTPUTS / preset.name / stage / "unet":
        frames, *size = clip_size(networks, Size(), phase)
        models = dataclasses.replace(models, trained_frames=frames, trained_size=(size[0], size[1]))
    return dataclasses.replace(
        models,
        passes="sequential" if networks.sequential else "auto",
        decode_chunk=networks.decode_chunk,
        decode_overlap=networks.decode_overlap,
    )


def _device_and_dtype(networks: Networks) -> tuple[str, Dtype]:
    device = networks.device
    if device == "auto":
        device = pick_device()
    if networks.dtype != "auto":
        return device, networks.dtype
    return device, "float32" if device == "cpu" else "bfloat16"


def _apply_loras(models: Models, values: list[str]) -> None:
    from svd.model.lora import load_lora, set_scales

    scales = {}
    for folder, scale in _lora_scales(values):
        name = re.sub(r"\W", "_", folder)
        if name in scales:
            raise UserError(f"--lora {folder} is given twice; give it once with the sum of the scales")
        load_lora(models.unet, Path(folder), name)
        scales[name] = scale
    if scales:
        set_scales(models.unet, scales)
        weight = next(models.unet.parameters())
        models.unet.to(weight.device, weight.dtype)


def _lora_scales(values: list[str]) -> Iterator[tuple[str, float]]:
    for value in values:
        folder, colon, scale = value.rpartition(":")
        if not colon or Path(value).exists():
            yield value, 1.0
            continue
        try:
            yield folder, float(scale)
        except ValueError:
            raise UserError(f"--lora {value}: '{scale}' is no number; write FOLDER or FOLDER:SCALE") from None


def clip_size(networks: Networks, size: Size, phase: Phase) -> tuple[int, int, int]:
    """Return frames, height and width: from the options, else a released model's, else the preset's last phase."""
    from svd.model.formats.folders import is_released, published_clip

    model = networks.model
    released = model is not None and is_released(model)
    known = published_clip(model) if model and released else (phase.frames, phase.height, phase.width)
    return size.frames or known[0], size.height or known[1], size.width or known[2]


def chosen_sampling(
    networks: Networks, solving: Solving, preset: Preset, task: Task, guidance: float | None
) -> Sampling:
    """Return the sampling of a request: the preset's for the task, changed by the options that were given.

    A released model that starts from images is sampled as it was published, whatever the preset says.
    """
    found = task.preset_sampling(preset)
    return solving.sampling(base_sampling(networks, found) if "image" in task.columns.values() else found, guidance)


def base_sampling(networks: Networks, sampling: Sampling) -> Sampling:
    """Return `sampling`, or for a released model the settings that it is published with."""
    from svd.model.formats.folders import is_released
    from svd.tasks.base import RELEASED

    released = networks.model is not None and is_released(networks.model)
    return RELEASED if released else sampling


def covered_size(height: int | None, width: int | None, given: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return height and width as asked for; one left open keeps the shape of `given`, rounded to `multiple`."""
    if height is None and width is None:
        return given
    if height is None:
        height = max(1, round(given[0] * (width or 0) / given[1] / multiple)) * multiple
    if width is None:
        width = max(1, round(given[1] * height / given[0] / multiple)) * multiple
    return height, width
