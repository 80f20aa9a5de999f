"""Rendered orbits as a latent cache: the multi-view model trains through the same loader as all others (§4.5, D.6)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from svd.catalogue.axes import SUBSET_AXES
from svd.config import Geometry
from svd.core.errors import UserError
from svd.core.files import write_json
from svd.latents.cache import digest, geometry_name, write_index, write_shard
from svd.latents.stage import LatentEncoder
from svd.stage import StageContext

# The paper states no frame rate of an orbit. Every orbit gets the same constants, so they carry no information.
ORBIT_FPS = 7.0
ORBIT_MOTION_BUCKET = 127
TEST_SHARE = 8
FRAMES_AT_ONCE = 64


def cache_orbits(context: StageContext, folder: Path) -> Path:
    """Encode the orbits of the stage `orbits` into `folder`, shard by shard; a killed run keeps the finished shards.

    Every eighth object, at least one, is held out for the validation loss. Raises UserError when there are fewer than
    two.
    """
    orbits = context.inputs["orbits"]
    if (folder / "latents.json").exists():
        return folder
    if not (orbits / "index.json").is_file():
        raise UserError(f"{orbits}: no rendered orbits here (index.json is missing); run the stage 'orbits' first")
    encoder = LatentEncoder(context.inputs["autoencoder"], context.inputs["encoders"], context)
    files = sorted(orbits.glob("orbits-*.safetensors"))
    parts = [_encode(path, encoder, folder / "shards") for path in tqdm(files, desc="orbit latents", unit="shard")]
    rows = [row for part in parts for row in json.loads(part.read_text())]
    if len(rows) < 2:
        raise UserError(f"{orbits}: {len(rows)} orbits are too few to train and validate on; raise 'orbits.objects'")
    split = [{**row, "split": "test" if k % TEST_SHARE == 0 else "train"} for k, row in enumerate(rows)]
    write_index(folder, split, encoder.facts() | {"samples": len(rows)}, encoder.texts([""])[0])
    return folder


def _encode(path: Path, encoder: LatentEncoder, folder: Path) -> Path:
    """Encode one shard of orbits; return the path of its part of the index, which is written last."""
    name = f"{path.stem}.safetensors"
    done = folder / f"{name}.json"
    if done.exists():
        return done
    with safe_open(path, "pt") as file:
        elevations = file.get_tensor("elevation").tolist()
        frames = file.get_slice("frames")
        tensors: dict[str, list[Tensor]] = {"moments": [], "image": [], "frame": []}
        step = max(1, FRAMES_AT_ONCE // frames.get_shape()[1])
        for first in range(0, len(elevations), step):
            part = torch.as_tensor(frames[first : first + step]).permute(0, 1, 4, 2, 3).contiguous()
            moments, image = encoder.videos(part)
            tensors["moments"].append(moments)
            tensors["image"].append(image)
            tensors["frame"].append(part[:, -1])
            geometry = Geometry(frames=part.shape[1], height=part.shape[3], width=part.shape[4])
    write_shard(folder / name, {key: torch.cat(parts) for key, parts in tensors.items()})
    write_json(done, [_row(name, k, elevation, geometry) for k, elevation in enumerate(elevations)])
    return done


def _row(shard: str, number: int, elevation: float, geometry: Geometry) -> Mapping[str, Any]:
    return {
        "sample_id": digest("orbit", shard, number),
        "clip_id": f"{shard}/{number}",
        "geometry": geometry_name(geometry),
        "split": "train",
        "fps": ORBIT_FPS,
        "motion_bucket": ORBIT_MOTION_BUCKET,
        **{axis.column: None for axis in SUBSET_AXES},
        "camera": "orbit",
        "elevation": elevation,
        "shard": shard,
        "row": number,
        "captions": [],
    }
