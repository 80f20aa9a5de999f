"""What `--model` of `svd generate` may name: a hub's repository is fetched, and what a model lacks is asked for."""

from __future__ import annotations

import dataclasses
import re

from flows.cli.generate_options import Networks
from svd.core.errors import UserError


def fetched(networks: Networks, encoder: str) -> Networks:
    """A hub's repository (owner/name) in `--model` replaced by its folder, which holds what no other option gives.

    encoder: the part of a pipeline that the task needs beside U-Net and autoencoder. Raises UserError when `--model` is
    neither a path nor such a repository.
    """
    model = networks.model
    if model is None or model.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)):
        return networks
    from svd.model.formats.hub import UNET_FILES, VAE_FILES, resolve

    files = [*UNET_FILES]
    if networks.autoencoder is None:
        files += VAE_FILES
    if networks.encoders is None:
        files += [f"{encoder}/config.json", f"{encoder}/model.safetensors"]
    small_first = sorted(files, key=lambda name: name.endswith(".safetensors"))
    try:
        return dataclasses.replace(networks, model=resolve(str(model), small_first))
    except UserError as error:
        raise UserError(f"--model {model}: no such file or folder, and as a repository of the hub: {error}") from None


def check_parts(networks: Networks) -> None:
    """Raises UserError for a model without U-Net, and for a released one that lacks a part which no option gives: the
    preset's networks are no substitute.
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
