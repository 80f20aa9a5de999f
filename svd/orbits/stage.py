"""Stage `orbits`: rendered circles around objects for the multi-view finetuning (§4.5, D.6).

Format: `orbits-%05d.safetensors` with frames (N, V, H, W, 3) uint8 sRGB on white, elevation (N,) float32 degrees and
azimuth (N, V) float32 degrees relative to the conditioning view; the conditioning view is the last one (azimuth 0).
`index.json` names the objects of each shard and how they were rendered. Every object has its own elevation, heading and
light, all functions of the preset's seed and the object's number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from safetensors.numpy import save_file

from svd.config import OrbitsConfig
from svd.core.errors import UserError
from svd.core.files import atomic_file, write_json
from svd.orbits.meshes import Mesh, MeshStyle, load_mesh, mesh_files, procedural_mesh
from svd.orbits.render import Light, Renderer, hdr_light, on_white, orbit_azimuths, render_orbit, sky_light
from svd.orbits.renderer import open_renderer
from svd.stage import Report, StageContext, publish

Split = Literal["train", "test"]

_SHARD_BYTES = 512_000_000
_SPLIT_KEY = {"train": 0, "test": 1}  # procedural objects of the two splits share no seed
_PURPOSE = {"mesh": 0, "camera": 1, "light": 2}


@dataclass(frozen=True)
class Orbit:
    """A rendered orbit.

    frames: (V, H, W, 3) uint8 sRGB on white, the conditioning view last; elevation and azimuth (V,): degrees.
    """

    name: str
    frames: NDArray[np.uint8]
    elevation: float
    azimuth: NDArray[np.float32]


def key(seed: int, split: Split, number: int, purpose: str) -> tuple[int, ...]:
    """Return the seed of one random decision about one object."""
    return (seed, _SPLIT_KEY[split], number, _PURPOSE[purpose])


def objects(meshes: Sequence[str], count: int) -> list[Path | None]:
    """Choose the mesh files to render, or `count` times None for procedural objects.

    Files come in the order of the hashes of their names: the alphabetically first would be a biased choice. Raises
    UserError for a missing path.
    """
    if not meshes:
        return [None] * count
    files = sorted(mesh_files(meshes), key=lambda path: hashlib.sha256(mesh_name(path, meshes).encode()).digest())
    return list(files[:count])


def mesh_name(path: Path, meshes: Sequence[str]) -> str:
    """Return the name of a mesh file: its path relative to the one of `meshes` that holds it."""
    for base in (Path(entry).expanduser() for entry in meshes):
        if path != base and path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return path.name


def load_object(
    path: Path | None, up: Literal["y", "z"], seed: int, split: Split, number: int, style: MeshStyle = "patterned"
) -> Mesh:
    """Load a mesh file, or make the procedural object of that number and style."""
    return load_mesh(path, up) if path is not None else procedural_mesh(key(seed, split, number, "mesh"), style)


def training_light(files: Sequence[Path], seed: int, split: Split, number: int) -> Light:
    """Choose a random .hdr file, rotated randomly about the vertical axis, or a procedural sky without `files`."""
    if not files:
        return sky_light(key(seed, split, number, "light"))
    generator = np.random.default_rng(key(seed, split, number, "light"))
    return hdr_light(files[int(generator.integers(len(files)))], turn=float(generator.uniform(0, 360)))


def environment_files(paths: Sequence[str]) -> list[Path]:
    """List the .hdr files at files and folders, sorted; raises UserError when a path is missing or holds none."""
    found: list[Path] = []
    for entry in paths:
        path = Path(entry).expanduser()
        files = [path] if path.is_file() else sorted(path.rglob("*.hdr"))
        if not files:
            raise UserError(f"orbits.environments: no .hdr file at '{entry}'")
        found += files
    return found


def render_training_orbit(
    mesh: Mesh, number: int, config: OrbitsConfig, seed: int, light: Light, renderer: Renderer
) -> Orbit:
    """Render the orbit of training object `number`: random heading and elevation, constant over the circle (D.6)."""
    generator = np.random.default_rng(key(seed, "train", number, "camera"))
    elevation = float(generator.uniform(config.min_elevation, config.max_elevation))
    heading = float(generator.uniform(0, 360))
    azimuths = orbit_azimuths(config.views)
    views = render_orbit(mesh, azimuths + heading, elevation, config.size, config.fov, config.radius, light, renderer)
    return Orbit(mesh.name, on_white(views), elevation, azimuths.astype(np.float32))


def run(context: StageContext) -> Report:
    """Render the training orbits shard by shard; finished shards are kept when the stage is killed and run again.

    Raises UserError when meshes or environments are missing or unreadable, or no renderer works.
    """
    config, seed = context.preset.orbits, context.preset.seed
    finished = context.work / "finished"
    finished.mkdir(parents=True, exist_ok=True)
    files, lights = objects(config.meshes, config.objects), environment_files(config.environments)
    per_shard = max(1, _SHARD_BYTES // (config.views * config.size**2 * 3))
    starts = range(0, len(files), per_shard)
    shards: list[dict[str, Any]] = []
    with open_renderer(config.renderer) as renderer:

        def render(number: int) -> Orbit:
            mesh = load_object(files[number], config.up, seed, "train", number, config.style)
            return render_training_orbit(
                mesh, number, config, seed, training_light(lights, seed, "train", number), renderer
            )

        for shard, start in enumerate(starts):
            path = finished / f"orbits-{shard:05d}.safetensors"
            part = context.work / f"{path.stem}.json"
            if not (path.exists() and part.exists()):
                numbers = range(start, min(start + per_shard, len(files)))
                title = f"orbits, shard {shard + 1} of {len(starts)}"
                orbits = [render(number) for number in track(numbers, title, console=Console(stderr=True))]
                write_orbits(path, orbits)
                write_json(part, {"file": path.name, "objects": [orbit.name for orbit in orbits]})
            shards.append(json.loads(part.read_text()))
        how = {"renderer": renderer.name, "fov": config.fov, "radius": config.radius}
    write_json(finished / "index.json", {"shards": shards, "views": config.views, "size": config.size, **how})
    metrics: dict[str, float | int | str] = {"objects": len(files), "frames": len(files) * config.views}
    return publish(finished, context.output, Report(metrics, f"{len(files)} orbits of {config.views} views"))


def write_orbits(path: Path, orbits: Sequence[Orbit]) -> None:
    """Write a shard atomically."""
    tensors: dict[str, NDArray[Any]] = {
        "frames": np.stack([orbit.frames for orbit in orbits]),
        "elevation": np.array([orbit.elevation for orbit in orbits], np.float32),
        "azimuth": np.stack([orbit.azimuth for orbit in orbits]),
    }
    with atomic_file(path, mode=0o644) as temporary:  # safetensors would write 0o600
        save_file(tensors, temporary)
