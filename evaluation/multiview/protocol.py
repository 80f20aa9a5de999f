"""Protocols of the multi-view benchmark: cameras, light and order of the views; and the rendered truth.

The paper names neither its 50 objects nor camera, light, background, resolution and the views that count (§4.5, Fig.
10). So a protocol here is a set of choices with a name: `svd_gso_v1` after SVD and SV3D, `syncdreamer_gso_v1` after
SyncDreamer's published renders. Both composite on white and leave the conditioning view out of the averages. Views are
in the model's order, azimuth 360 (v + 1) / V degrees: the conditioning view is the last one.
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
from svd.orbits.meshes import Mesh, mesh_key
from svd.orbits.render import SUPERSAMPLING, Light, Renderer, on_white, orbit_azimuths, render_orbit, white_light
from svd.orbits.stage import key, load_object, mesh_name, objects
from svd.storage import write_bytes

Views = NDArray[np.uint8]  # (V, S, S, 3)

PROCEDURAL = "procedural_test_objects"


@dataclass(frozen=True)
class ViewProtocol:
    """Cameras, light and size of the benchmark's views.

    elevation, fov: in degrees. radius: distance of the camera; the longest side of the object is 1. ambient: strength
    of the white light; the share `headlight` of it comes from the camera, the rest from everywhere. supersampling:
    samples per pixel and axis. renderer: the one that draws the truth, since no two agree at edges.
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
        """The azimuths in degrees, (views,); the last one, 0, is the conditioning view."""
        return orbit_azimuths(self.views)

    @property
    def light(self) -> Light:
        """The benchmark's light."""
        white = white_light(self.headlight)
        return Light(white.irradiance * np.float32(self.ambient), self.headlight)

    @property
    def digest(self) -> str:
        """Twelve hex digits that change with every value of the protocol."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


PROTOCOLS = {
    "svd_gso_v1": ViewProtocol("svd_gso_v1", 21, 576, 10.0, 33.8, 2.0, ambient=1.0, headlight=0.25),
    # As Blender's lens of 35 mm on a sensor of 32 mm, and an environment of strength 0.5.
    "syncdreamer_gso_v1": ViewProtocol("syncdreamer_gso_v1", 16, 256, 30.0, 49.13, 1.5, ambient=0.5, headlight=0.0),
}


def view_protocol(config: MultiviewBenchmark, renderer: str) -> ViewProtocol:
    """Return the configured protocol, drawn by `renderer`; values that are changed become part of its name."""
    base = replace(PROTOCOLS[config.protocol], renderer=renderer)
    changed = {name: value for name in ("views", "size", "elevation") if (value := getattr(config, name)) is not None}
    changed = {name: value for name, value in changed.items() if value != getattr(base, name)}
    if not changed:
        return base
    suffix = ",".join(f"{name}={value:g}" for name, value in changed.items())
    return replace(base, name=f"{base.name}[{suffix}]", **changed)


@dataclass(frozen=True)
class Truth:
    """The rendered truth on disk: one array (V, S, S, 3) uint8 per object, on white.

    Files are named by their content, so that those of another set of objects are never taken.
    """

    names: Sequence[str]
    files: Sequence[Path]
    dataset: str

    def views(self, number: int) -> Views:
        """Read the views of an object, (V, S, S, 3), the conditioning view last."""
        return np.asarray(np.load(self.files[number]), np.uint8)


def render_truth(
    folder: Path, config: MultiviewBenchmark, protocol: ViewProtocol, seed: int, renderer: Renderer
) -> Truth:
    """Render the held-out objects into `folder`; finished ones are kept.

    Procedural objects come from seeds that no training orbit has, and their heading is drawn by seed; meshes from files
    are seen from their front. Raises UserError for missing or unreadable meshes and when the renderer fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = objects(config.meshes, config.objects)
    names, files = [], []
    for number, path in enumerate(track(paths, "benchmark objects", console=Console(stderr=True))):
        if path is None:
            name = content = mesh_key(key(seed, "test", number, "mesh"), config.style)
        else:
            name = mesh_name(path, config.meshes)
            content = f"{name} {config.up} {file_hash(path)}"
        file = folder / f"{number:05d}-{hashlib.sha256(content.encode()).hexdigest()[:12]}.npy"
        if not file.exists():
            mesh = load_object(path, config.up, seed, "test", number, config.style)
            save_array(file, _views(mesh, protocol, _heading(path, seed, number), renderer))
        names.append(name)
        files.append(file)
    return Truth(names, files, "meshes" if config.meshes else PROCEDURAL)


def _heading(path: Path | None, seed: int, number: int) -> float:
    if path is not None:
        return 0.0
    return float(np.random.default_rng(key(seed, "test", number, "camera")).uniform(0, 360))


def _views(mesh: Mesh, protocol: ViewProtocol, heading: float, renderer: Renderer) -> Views:
    azimuths = protocol.azimuths + heading
    rgba = render_orbit(
        mesh, azimuths, protocol.elevation, protocol.size, protocol.fov, protocol.radius, protocol.light, renderer
    )
    return on_white(rgba)


def save_array(path: Path, array: NDArray[np.generic]) -> None:
    """Write an array as .npy, atomically."""
    stream = io.BytesIO()
    np.save(stream, array)
    write_bytes(path, stream.getvalue())
