"""Protocols of the multi-view benchmark: cameras, light and order of the views; and the rendered truth.

The paper names neither its 50 objects nor camera, light, background, resolution or which views count (§4.5, Fig. 10),
so a protocol here is a set of choices with a name: `svd_gso_v1` after SVD and SV3D, `syncdreamer_gso_v1` after
SyncDreamer's published renders. Both composite on white and leave the conditioning view out of the averages. Views are
kept in the model's order, azimuth 360 (v + 1) / V degrees, so that the conditioning view is the last one.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from svd.config import MultiviewBenchmark
from svd.model.formats.folders import file_hash
from svd.orbits.meshes import Mesh
from svd.orbits.render import SUPERSAMPLING, Light, Renderer, on_white, orbit_azimuths, render_orbit, white_light
from svd.orbits.stage import key, load_object, mesh_name, objects
from svd.storage import write_bytes

Pictures = NDArray[np.uint8]

PROCEDURAL = "procedural_test_objects"


@dataclass(frozen=True)
class ViewProtocol:
    """elevation, fov in degrees; the object's longest side is 1 and radius the distance of the camera.

    ambient: uniform white light, of which `headlight` is the share that comes from the camera instead. renderer: what
    drew the truth, since no two agree at edges; supersampling: samples a pixel and axis.
    """

    name: str
    views: int
    size: int
    elevation: float
    fov: float
    radius: float
    ambient: float
    headlight: float
    supersampling: int = SUPERSAMPLING
    renderer: str = ""

    @property
    def azimuths(self) -> NDArray[np.float64]:
        """Degrees, (views,); the last is 0, the conditioning view."""
        return orbit_azimuths(self.views)

    @property
    def light(self) -> Light:
        """The benchmark's light."""
        white = white_light(self.headlight)
        return Light(white.irradiance * np.float32(self.ambient), self.headlight)

    @property
    def digest(self) -> str:
        """Identity of the protocol: changes with any of its values."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


PROTOCOLS = {
    "svd_gso_v1": ViewProtocol("svd_gso_v1", 21, 576, 10.0, 33.8, 2.0, ambient=1.0, headlight=0.25),
    # Blender's lens of 35 mm on a sensor of 32 mm, environment of strength 0.5
    "syncdreamer_gso_v1": ViewProtocol("syncdreamer_gso_v1", 16, 256, 30.0, 49.13, 1.5, ambient=0.5, headlight=0.0),
}


def make_protocol(config: MultiviewBenchmark, renderer: str) -> ViewProtocol:
    """The named protocol as drawn by `renderer`; values that the configuration changes become part of its name."""
    base = replace(PROTOCOLS[config.protocol], renderer=renderer)
    changed = {name: value for name in ("views", "size", "elevation") if (value := getattr(config, name)) is not None}
    changed = {name: value for name, value in changed.items() if value != getattr(base, name)}
    if not changed:
        return base
    suffix = ",".join(f"{name}={value:g}" for name, value in changed.items())
    return replace(base, name=f"{base.name}[{suffix}]", **changed)


@dataclass(frozen=True)
class Truth:
    """The rendered truth on disk: one array (V, S, S, 3) uint8 on white an object. Files are named after what they
    show, so that what is kept of one set of objects is never taken for another."""

    names: Sequence[str]
    files: Sequence[Path]
    dataset: str

    def pictures(self, number: int) -> Pictures:
        """Views of an object, the conditioning view last."""
        return np.asarray(np.load(self.files[number]), np.uint8)


def render_truth(
    folder: Path, config: MultiviewBenchmark, protocol: ViewProtocol, seed: int, renderer: Renderer
) -> Truth:
    """Render the held-out objects into `folder`; finished ones are kept.

    Procedural objects come from seeds that no training orbit has and stand at a seeded heading; mesh files are seen
    from their front. Raises UserError for missing or unreadable meshes and when the renderer fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = objects(config.meshes, config.objects)
    names, files = [], []
    for number, path in enumerate(track(paths, "benchmark objects", console=Console(stderr=True))):
        if path is None:
            name = content = "procedural-" + "-".join(map(str, key(seed, "test", number, "mesh")))
        else:
            name = mesh_name(path, config.meshes)
            content = f"{name} {config.up} {file_hash(path)}"
        file = folder / f"{number:05d}-{hashlib.sha256(content.encode()).hexdigest()[:12]}.npy"
        if not file.exists():
            mesh = load_object(path, config.up, seed, "test", number)
            save_array(file, _views(mesh, protocol, _heading(path, seed, number), renderer))
        names.append(name)
        files.append(file)
    return Truth(names, files, "meshes" if config.meshes else PROCEDURAL)


def _heading(path: Path | None, seed: int, number: int) -> float:
    if path is not None:
        return 0.0
    return float(np.random.default_rng(key(seed, "test", number, "camera")).uniform(0, 360))


def _views(mesh: Mesh, protocol: ViewProtocol, heading: float, renderer: Renderer) -> Pictures:
    azimuths = protocol.azimuths + heading
    rgba = render_orbit(
        mesh, azimuths, protocol.elevation, protocol.size, protocol.fov, protocol.radius, protocol.light, renderer
    )
    return on_white(rgba)


def save_array(path: Path, array: NDArray[np.generic]) -> None:
    """Write an array; the file appears under its name only when it is complete."""
    stream = io.BytesIO()
    np.save(stream, array)
    write_bytes(path, stream.getvalue())
