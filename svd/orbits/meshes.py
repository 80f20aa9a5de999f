"""Textured meshes: procedural, seeded, asymmetric ones, and GLB or OBJ files.

A mesh is upright along +y; at azimuth 0 the camera looks at it from +z. `normalised` puts the middle of its bounding
box at the origin and makes the longest side 1, as SyncDreamer's and the paper's renders do (§4.5).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from svd.core.errors import UserError
from svd.synthetic.drawing import COLOURS

Floats = NDArray[np.float32]
MeshStyle = Literal["patterned", "plain"]
PLAIN_COLOURS = ("red", "yellow", "green", "blue")
SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl")

_ROWS, _COLUMNS = 48, 96
_TEXTURE_HEIGHT = 256
_BOUNDING_RADIUS = 0.54  # seen whole at the benchmark's distance of 2 and field of view of 33.8 degrees


@dataclass(frozen=True)
class Part:
    """A piece of a mesh with one texture.

    vertices, normals: (N, 3); uv: (N, 2) with v = 0 at the texture's first row; faces: (M, 3) int32; texture: (h, w, 3)
    uint8 sRGB.
    """

    vertices: Floats
    normals: Floats
    uv: Floats
    faces: NDArray[np.int32]
    texture: NDArray[np.uint8]


@dataclass(frozen=True)
class Mesh:
    """A textured object."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bounds(self) -> NDArray[np.float64]:
        """The lowest and the highest corner of the bounding box, (2, 3)."""
        every = np.concatenate([part.vertices for part in self.parts]).astype(np.float64)
        return np.stack([every.min(0), every.max(0)])


def normalised(mesh: Mesh) -> Mesh:
    """Move the middle of the bounding box to the origin and scale the longest side to 1; raises UserError if empty."""
    low, high = mesh.bounds
    longest = float((high - low).max())
    if not np.isfinite(longest) or longest <= 0:
        raise UserError(f"{mesh.name}: the mesh has no extent; it can't be rendered")
    middle = (low + high) / 2
    parts = (replace(p, vertices=((p.vertices - middle) / longest).astype(np.float32)) for p in mesh.parts)
    return Mesh(mesh.name, tuple(parts))


def _directions() -> tuple[NDArray[np.float64], Floats]:
    """Return points of the unit sphere on a grid whose first and last column coincide, (N, 3), and their uv, (N, 2)."""
    v, u = np.meshgrid(np.linspace(0, 1, _ROWS), np.linspace(0, 1, _COLUMNS), indexing="ij")
    return _sphere(u, v).reshape(-1, 3), np.stack([u, v], -1).reshape(-1, 2).astype(np.float32)


def _sphere(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    polar, around = np.pi * v, 2 * np.pi * u
    return np.stack([np.sin(polar) * np.sin(around), np.cos(polar), np.sin(polar) * np.cos(around)], -1)


def _grid_faces() -> NDArray[np.int32]:
    index = np.arange(_ROWS * _COLUMNS).reshape(_ROWS, _COLUMNS)
    a, b, c, d = index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]
    return np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)]).astype(
        np.int32
    )


def _normals(vertices: NDArray[np.float64], faces: NDArray[np.int32]) -> Floats:
    """Return area-weighted vertex normals of a grid, equal on both sides of its seam and at its poles."""
    corners = vertices[faces]
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    total = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(total, faces[:, corner], across)
    grid = total.reshape(_ROWS, _COLUMNS, 3)
    grid[:, 0] = grid[:, -1] = grid[:, 0] + grid[:, -1]
    grid[0], grid[-1] = grid[0].sum(0), grid[-1].sum(0)
    return (grid / np.maximum(np.linalg.norm(grid, axis=-1, keepdims=True), 1e-12)).reshape(-1, 3).astype(np.float32)


def _waves(
    directions: NDArray[np.floating[Any]], generator: np.random.Generator, count: int, rate: float
) -> NDArray[Any]:
    """Return a smooth random function on the sphere, roughly in [-1, 1]; `rate` is its highest angular frequency."""
    total = np.zeros(directions.shape[:-1], directions.dtype)
    for _ in range(count):
        axis = generator.normal(size=3)
        axis *= generator.uniform(0.4, 1) * rate / np.linalg.norm(axis)
        phase = directions.dtype.type(generator.uniform(0, 2 * np.pi))
        total += np.sin(directions @ axis.astype(directions.dtype) + phase)
    return total / directions.dtype.type(np.sqrt(count))


@functools.cache
def _texture_grid() -> tuple[Floats, Floats, Floats]:
    """Return u and v of the texture's pixels, (h, w), and their directions, (h, w, 3)."""
    height, width = _TEXTURE_HEIGHT, 2 * _TEXTURE_HEIGHT
    v, u = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return u.astype(np.float32), v.astype(np.float32), _sphere(u, v).astype(np.float32)


def _texture(generator: np.random.Generator, palette: Sequence[str]) -> NDArray[np.uint8]:
    """Make a seamless texture, (h, w, 3) uint8: a pattern in two colours, with up to two patches in others.

    Of one colour it is even.
    """
    u, v, directions = _texture_grid()
    colours = [np.array(COLOURS[name], np.float32) for name in palette]
    if len(colours) == 1:
        return np.broadcast_to(colours[0], directions.shape).astype(np.uint8)
    kind = int(generator.integers(4))
    n = int(generator.integers(3, 6))
    around, up = 2 * np.pi * n * u, np.pi * n * v
    waves = (np.sin(around), np.sin(2 * up), np.sin(around) * np.sin(2 * up), np.sin(around + 4 * up))[kind]
    blend = 1 / (1 + np.exp(-10 * (waves + 0.4 * _waves(directions, generator, 3, 3.0))))
    texture = colours[0] * blend[..., None] + colours[1] * (1 - blend[..., None])
    for colour, size in zip(colours[2:], (0.82, 0.72), strict=False):
        centre = generator.normal(size=3) * (1, 0.4, 1)
        centre /= np.linalg.norm(centre)
        edge = 60 * (directions @ centre.astype(np.float32) - np.float32(size))
        patch = 1 / (1 + np.exp(-np.clip(edge, -30, 30)))
        texture = texture * (1 - patch[..., None]) + colour * patch[..., None]
    mottling = 1 + 0.06 * _waves(directions, generator, 6, 25.0)[..., None]
    return np.clip(texture * mottling, 0, 255).astype(np.uint8)


def _blob(
    generator: np.random.Generator, centre: NDArray[np.float64], axes: NDArray[np.float64], palette: Sequence[str]
) -> Part:
    """Make a deformed superquadric: box, cylinder, ellipsoid, octahedron or anything between them."""
    directions, uv = _directions()
    exponent = generator.uniform(2, 6) if generator.random() < 0.6 else generator.uniform(1.1, 2)
    radius = (np.abs(directions) ** exponent).sum(-1) ** (-1 / exponent)
    radius *= 1 + 0.1 * _waves(directions, generator, 4, 3.5)
    vertices = directions * radius[:, None] * axes
    taper = 1 + generator.uniform(-0.35, 0.35) * vertices[:, 1:2] / axes[1]
    vertices[:, [0, 2]] *= taper
    vertices += centre
    faces = _grid_faces()
    return Part(vertices.astype(np.float32), _normals(vertices, faces), uv, faces, _texture(generator, palette))


def procedural_mesh(seed: int | Sequence[int], style: MeshStyle = "patterned") -> Mesh:
    """Make a seeded object whose sides differ.

    patterned: a body with two to four attachments, each in a pattern of several of ten colours. plain: what minutes of
    training can learn, a body in one of four even colours with a knob in another; it is twice as wide as deep.
    """
    generator = np.random.default_rng(seed)
    parts = _plain_parts(generator) if style == "plain" else _patterned_parts(generator)
    key = [seed] if isinstance(seed, int) else list(seed)
    return _inside(normalised(Mesh(mesh_key(key, style), tuple(parts))), _BOUNDING_RADIUS)


def mesh_key(key: Sequence[int], style: MeshStyle) -> str:
    """Return the name of the procedural object of a seed."""
    return "-".join(["procedural", *(["plain"] if style == "plain" else []), *map(str, key)])


def _plain_parts(generator: np.random.Generator) -> list[Part]:
    body, knob = generator.permutation(PLAIN_COLOURS)[:2].tolist()
    axes = np.array([1.0, generator.uniform(0.6, 1.0), generator.uniform(0.45, 0.55)])
    angle = generator.uniform(0, 2 * np.pi)
    place = np.array([np.sin(angle), 0, np.cos(angle)]) * axes * 0.95
    return [_blob(generator, np.zeros(3), axes, [body]), _blob(generator, place, np.full(3, 0.38), [knob])]


def _patterned_parts(generator: np.random.Generator) -> list[Part]:
    names = list(COLOURS)
    axes = generator.uniform(0.45, 1.0, 3)
    parts = [_blob(generator, np.zeros(3), axes, generator.permutation(names)[:4].tolist())]
    for number in range(int(generator.integers(2, 5))):
        angle = generator.uniform(0, 2 * np.pi)
        height = generator.uniform(0.3, 0.9) * (1 if number % 2 == 0 else generator.choice([-1, 1]))
        out = np.array([np.sin(angle), 0, np.cos(angle)]) * np.sqrt(max(0.1, 1 - height**2))
        centre = (out + np.array([0, height, 0])) * axes * 0.95
        small = axes.mean() * generator.uniform(0.2, 0.42) * generator.uniform(0.6, 1.4, 3)
        parts.append(_blob(generator, centre, small, generator.permutation(names)[:3].tolist()))
    return parts


def _inside(mesh: Mesh, radius: float) -> Mesh:
    """Shrink the mesh if needed, so that it fits into a sphere and no view of an orbit cuts it off."""
    farthest = max(float(np.linalg.norm(part.vertices, axis=1).max()) for part in mesh.parts)
    scale = np.float32(min(1.0, radius / farthest))
    return Mesh(mesh.name, tuple(replace(part, vertices=part.vertices * scale) for part in mesh.parts))


def mesh_files(paths: Sequence[str]) -> list[Path]:
    """List all mesh files at files and folders, sorted; raises UserError when a path is missing or holds none."""
    found: list[Path] = []
    for entry in paths:
        path = Path(entry).expanduser()
        if not path.exists():
            raise UserError(f"meshes: '{entry}' does not exist; give files or folders of {', '.join(SUFFIXES)}")
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"meshes: no {', '.join(SUFFIXES)} file in '{entry}'")
        found += files
    return found


def load_mesh(path: Path, up: Literal["y", "z"] = "y") -> Mesh:
    """Read a GLB, glTF, OBJ, PLY or STL file with its textures; `up` is the file's upright axis (glTF: y; GSO: z).

    Raises UserError when the file can't be read or holds no triangle.
    """
    try:
        scene = trimesh.load_scene(path, process=False)
        pieces = [piece for piece in scene.dump() if isinstance(piece, trimesh.Trimesh) and len(piece.faces)]
    except Exception as error:  # trimesh and its readers raise whatever their parsers do
        raise UserError(f"{path}: not a readable mesh ({type(error).__name__}: {error})") from None
    if not pieces:
        raise UserError(f"{path}: the file holds no triangle")
    turn = np.eye(3) if up == "y" else np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    parts = tuple(_part(piece, turn) for piece in pieces)
    return normalised(Mesh(path.stem, parts))


def _part(piece: trimesh.Trimesh, turn: NDArray[np.float64]) -> Part:
    texture, uv = _loaded_texture(piece)
    return Part(
        vertices=(np.asarray(piece.vertices) @ turn.T).astype(np.float32),
        normals=(np.asarray(piece.vertex_normals) @ turn.T).astype(np.float32),
        uv=uv,
        faces=np.asarray(piece.faces, np.int32),
        texture=texture,
    )


def _loaded_texture(piece: trimesh.Trimesh) -> tuple[NDArray[np.uint8], Floats]:
    """Return base colour texture and uv; a piece without a texture gets one pixel per vertex (or face) colour."""
    visual: Any = piece.visual
    uv = getattr(visual, "uv", None)
    material = getattr(visual, "material", None)
    if uv is not None and material is not None:
        image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
        if isinstance(image, Image.Image):
            flipped = np.stack([np.asarray(uv)[:, 0], 1 - np.asarray(uv)[:, 1]], -1)
            return np.asarray(image.convert("RGB"), np.uint8), flipped.astype(np.float32)
        colour = np.asarray(material.main_color, np.uint8)[:3]
        return np.tile(colour, (1, 1, 1)), np.full((len(piece.vertices), 2), 0.5, np.float32)
    plain = visual.to_color() if hasattr(visual, "to_color") else visual
    colours = np.asarray(plain.vertex_colors, np.uint8)[:, :3]
    side = int(np.ceil(np.sqrt(len(colours))))
    atlas = np.zeros((side * side, 3), np.uint8)
    atlas[: len(colours)] = colours
    index = np.arange(len(colours))
    places = np.stack([(index % side + 0.5) / side, (index // side + 0.5) / side], -1)
    return atlas.reshape(side, side, 3), places.astype(np.float32)
