"""Procedural meshes and mesh files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from svd.core.errors import UserError
from svd.orbits.meshes import (
    PLAIN_COLOURS,
    Mesh,
    MeshStyle,
    Part,
    load_mesh,
    mesh_files,
    normalised,
    procedural_mesh,
)
from svd.synthetic.drawing import COLOURS


def box(extents: tuple[float, float, float], picture: Image.Image | None = None) -> trimesh.Trimesh:
    mesh = trimesh.creation.box(extents=extents)
    mesh.apply_translation((5, -3, 2))
    if picture is not None:
        uv = np.random.default_rng(0).random((len(mesh.vertices), 2))
        mesh.visual = trimesh.visual.TextureVisuals(uv=uv, image=picture)
    return mesh


def test_seeded_and_different() -> None:
    a, b, c = procedural_mesh((0, 0, 1)), procedural_mesh((0, 0, 1)), procedural_mesh((0, 1, 1))
    assert a.name != c.name and len(a.parts) >= 3
    for one, two in zip(a.parts, b.parts, strict=True):
        assert np.array_equal(one.vertices, two.vertices) and np.array_equal(one.texture, two.texture)
    assert not np.array_equal(a.parts[0].vertices, c.parts[0].vertices)


@pytest.mark.parametrize("style", ["patterned", "plain"])
@pytest.mark.parametrize("seed", range(6))
def test_shapes_fit_and_are_well_formed(seed: int, style: MeshStyle) -> None:
    mesh = procedural_mesh(seed, style)
    assert (mesh.bounds[1] - mesh.bounds[0]).max() <= 1 + 1e-5
    for part in mesh.parts:
        assert np.linalg.norm(part.vertices, axis=1).max() <= 0.5401
        assert np.allclose(np.linalg.norm(part.normals, axis=1), 1, atol=1e-4)
        assert part.faces.max() == len(part.vertices) - 1 and part.uv.min() >= 0 and part.uv.max() <= 1
        outward = (part.normals * (part.vertices - part.vertices.mean(0))).sum(1)
        assert (outward > 0).mean() > 0.95


@pytest.mark.parametrize("seed", range(6))
def test_plain_objects_are_two_even_colours_and_wider_than_deep(seed: int) -> None:
    mesh = procedural_mesh((0, 0, seed), "plain")
    assert mesh.name == f"procedural-plain-0-0-{seed}"
    colours = [np.unique(part.texture.reshape(-1, 3), axis=0) for part in mesh.parts]
    assert [len(found) for found in colours] == [1, 1] and not np.array_equal(*colours)
    assert {COLOURS[name] for name in PLAIN_COLOURS} >= {tuple(found[0].tolist()) for found in colours}
    wide, _, deep = np.ptp(mesh.parts[0].vertices, axis=0)
    assert wide > 1.4 * deep


def test_textures_have_no_seam() -> None:
    texture = procedural_mesh(3).parts[0].texture.astype(int)
    across = np.abs(texture[:, 0] - texture[:, -1]).mean()
    assert across <= 3 * np.abs(np.diff(texture, axis=1)).mean() + 2


def test_no_side_looks_like_another() -> None:
    for seed in range(4):
        texture = procedural_mesh(seed).parts[0].texture.astype(int)
        for turn in (2, 3, 4):
            rolled = np.roll(texture, texture.shape[1] // turn, axis=1)
            assert np.abs(texture - rolled).mean() > 4


def test_normalised_centres_and_scales() -> None:
    part = procedural_mesh(0).parts[0]
    moved = Mesh("moved", (Part(part.vertices * 7 + 3, part.normals, part.uv, part.faces, part.texture),))
    low, high = normalised(moved).bounds
    assert np.allclose((low + high) / 2, 0, atol=1e-5) and np.isclose((high - low).max(), 1)
    point = Part(np.zeros((3, 3), np.float32), part.normals[:3], part.uv[:3], part.faces[:1], part.texture)
    with pytest.raises(UserError, match="no extent"):
        normalised(Mesh("point", (point,)))


def test_load_glb_with_texture(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 16, 3), np.uint8))
    box((1, 2, 4), picture).export(tmp_path / "box.glb")
    mesh = load_mesh(tmp_path / "box.glb")
    assert np.allclose(mesh.bounds[1] - mesh.bounds[0], (0.25, 0.5, 1), atol=1e-5)
    assert np.array_equal(mesh.parts[0].texture, np.asarray(picture))
    assert np.allclose((load_mesh(tmp_path / "box.glb", "z").bounds[1]) * 2, (0.25, 1, 0.5), atol=1e-5)


def test_load_obj_with_material_and_texture_orientation(tmp_path: Path) -> None:
    """The corner with texture coordinate (0, 1) shows the first row's first pixel, as OBJ defines."""
    picture = np.zeros((2, 2, 3), np.uint8)
    picture[0, 0] = (255, 0, 0)
    Image.fromarray(picture).save(tmp_path / "t.png")
    (tmp_path / "m.mtl").write_text("newmtl a\nKd 1 1 1\nmap_Kd t.png\n")
    (tmp_path / "m.obj").write_text(
        "mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl a\nf 1/1 2/2 3/3\n"
    )
    part = load_mesh(tmp_path / "m.obj").parts[0]
    top = int(np.argmax(part.vertices[:, 1]))
    assert np.allclose(part.uv[top], (0, 0)) and tuple(part.texture[0, 0]) == (255, 0, 0)


def test_load_vertex_and_plain_colours(tmp_path: Path) -> None:
    mesh = box((1, 1, 1))
    mesh.visual.vertex_colors = np.tile([10, 200, 30, 255], (len(mesh.vertices), 1)).astype(np.uint8)
    mesh.export(tmp_path / "a.ply")
    part = load_mesh(tmp_path / "a.ply").parts[0]
    height, width = part.texture.shape[:2]
    pixels = part.texture[(part.uv[:, 1] * height).astype(int), (part.uv[:, 0] * width).astype(int)]
    assert (pixels == (10, 200, 30)).all()


def test_mistakes_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.glb").write_bytes(b"no mesh")
    with pytest.raises(UserError, match=r"broken\.glb: not a readable mesh"):
        load_mesh(tmp_path / "broken.glb")
    with pytest.raises(UserError, match="does not exist"):
        mesh_files([str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.glb"):
        mesh_files([str(tmp_path / "empty")])
    trimesh.PointCloud(np.eye(3)).export(tmp_path / "points.ply")
    with pytest.raises(UserError, match=r"points\.ply"):
        load_mesh(tmp_path / "points.ply")
