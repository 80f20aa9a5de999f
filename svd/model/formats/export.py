"""Export the outputs of training for others: as diffusers' pipeline folder, or as a single file like Stability's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from svd.config import EncodersConfig
from svd.core.errors import UserError
from svd.core.files import atomic_folder
from svd.model.formats.encoders import load_encoders
from svd.model.formats.folders import load_autoencoder, load_unet, save_pipeline, trained_frames
from svd.model.formats.sgm import save_sgm
from svd.model.safetensors import of_module


def export_networks(model: Path, target: Path, to: Literal["sgm", "diffusers"], config: EncodersConfig) -> Path:
    """Put a trained U-Net, its autoencoder and its image encoder into `target`, a folder or a .safetensors file.

    model: output of a training stage, whose neighbours `autoencoder` and `encoders` are taken. Written beside the
    target and renamed; a folder gets the model card, too. Raises UserError for missing parts, an existing target, and
    what diffusers has no pipeline for.
    """
    if target.exists():
        raise UserError(f"{target}: exists already; choose another name or delete it")
    unet = load_unet(model / "unet")
    autoencoder = load_autoencoder(model.parent / "autoencoder")
    visual = load_encoders(model.parent / "encoders", config).image.visual
    heads = int(visual.transformer.resblocks[0].attn.num_heads)
    frames = trained_frames(model) or 14
    if to == "sgm":
        clip = {f"visual.{name}": tensor for name, tensor in of_module(visual).items()}
        save_sgm(target, unet, autoencoder, clip, frames, heads)
    else:
        with atomic_folder(target) as work:
            save_pipeline(work, unet, autoencoder, visual, heads, frames)
            if (model / "README.md").is_file():  # models of earlier versions have none
                shutil.copyfile(model / "README.md", work / "README.md")
    return target
