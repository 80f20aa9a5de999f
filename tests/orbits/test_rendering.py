"""Rendering: geometry, light, coverage and determinism, on both renderers."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import pytest

from svd.core.errors import UserError
from svd.orbits import renderer as renderer_module
from svd.orbits.meshes import Mesh, Part, procedural_mesh
from svd.orbits.render import (
    Light,
    Renderer,
    downsample,
    environment_light,
    eye_positions,
    hdr_light,
    irradiance,
    look_at,
    on_white,
    orbit_azimuths,
    render_orbit,
    sky_light,
    white_light,
)
from svd.orbits.renderer import open_renderer

FLAT = white_light(0.0)


@pytest.fixture(scope="module")
def gl() -> Iterator[Renderer]:
    with open_renderer("moderngl") as renderer:
        yield renderer


def square(centre: tuple[float, float, float], side: float, colour: tuple[int, int, int], facing: str) -> Part:
    """A flat square that faces +x or +z, both of its sides drawn."""
    a = side / 2
    corners = np.array([(-a, -a, 0), (a, -a, 0), (a, a, 0), (-a, a, 0)], np.float32)
    normal = np.array([0, 0, 1], np.float32)
    if facing == "x":
        corners, normal = corners[:, [2, 1, 0]] * (1, 1, -1), normal[[2, 1, 0]]
    return Part(
        vertices=(corners + centre).astype(np.float32),
        normals=np.tile(normal, (4, 1)).astype(np.float32),
        uv=np.array([(0, 1), (1, 1), (1, 0), (0, 0)], np.float32),
        faces=np.array([(0, 1, 2), (0, 2, 3)], np.int32),
        texture=np.full((2, 2, 3), colour, np.uint8),
    )


def test_azimuths_are_sv3ds() -> None:
    assert np.allclose(orbit_azimuths(21), np.linspace(0, 360, 22)[1:] % 360)
    assert orbit_azimuths(9)[-1] == 0 and orbit_azimuths(4).tolist() == [90, 180, 270, 0]


def test_eyes_and_camera_matrix() -> None:
    eyes = eye_positions([0, 90, 180], 0, 2.0)
    assert np.allclose(eyes, [(0, 0, 2), (2, 0, 0), (0, 0, -2)], atol=1e-9)
    assert np.allclose(eye_positions([0], 90, 2.0), [(0, 2, 0)], atol=1e-9)
    for eye in (*eyes, np.array([0.0, 2, 0])):
        matrix = look_at(eye)
        assert np.allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3)) and np.isclose(np.linalg.det(matrix), 1)
        assert np.allclose(matrix @ [0, 0, 0, 1], [0, 0, -2, 1], atol=1e-9)


def test_projection_size_and_colour(gl: Renderer) -> None:
    mesh = Mesh("square", (square((0, 0, 0), 0.5, (200, 100, 50), "z"),))
    view = render_orbit(mesh, [0], 0, 200, 33.8, 2.0, FLAT, gl)[0]
    rows, columns = np.nonzero(view[..., 3] > 127)
    expected = 0.5 / (2 * np.tan(np.deg2rad(33.8 / 2)) * 2.0) * 200
    assert abs(np.ptp(columns) + 1 - expected) <= 1 and abs(np.ptp(rows) + 1 - expected) <= 1
    assert abs(rows.mean() - 99.5) < 0.6 and abs(columns.mean() - 99.5) < 0.6
    assert np.abs(view[100, 100, :3].astype(int) - (200, 100, 50)).max() <= 1


def test_orbit_turns_the_right_way(gl: Renderer) -> None:
    """From azimuth 90 (the +x side) the camera sees the square that faces +x in front of the one behind it."""
    red, blue = square((0.4, 0, 0), 0.4, (255, 0, 0), "x"), square((-0.4, 0, 0), 0.4, (0, 0, 255), "x")
    views = render_orbit(Mesh("two", (red, blue)), [90, 270], 0, 64, 40, 2.0, FLAT, gl)
    assert views[0, 32, 32, 0] > 200 > 50 > views[0, 32, 32, 2] and views[1, 32, 32, 2] > 200
    marker = Mesh("marker", (square((0.4, 0, 0), 0.2, (255, 0, 0), "z"),))
    front = render_orbit(marker, [0], 0, 64, 40, 2.0, FLAT, gl)[0]
    assert np.nonzero(front[..., 3])[1].mean() > 40  # +x is on the right when seen from +z
    up = Mesh("up", (square((0, 0.4, 0), 0.2, (255, 0, 0), "z"),))
    assert np.nonzero(render_orbit(up, [0], 0, 64, 40, 2.0, FLAT, gl)[0, ..., 3])[0].mean() < 24


def test_elevation_looks_down(gl: Renderer) -> None:
    near = Mesh("near", (square((0, 0, 0.4), 0.2, (255, 0, 0), "z"),))
    level, above = (np.nonzero(render_orbit(near, [0], e, 64, 40, 2.0, FLAT, gl)[0, ..., 3])[0].mean() for e in (0, 30))
    assert above > level + 4


def test_texture_is_upright(gl: Renderer) -> None:
    part = square((0, 0, 0), 0.8, (0, 0, 0), "z")
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32] = (255, 0, 0)
    picture[32:, 32:] = (0, 255, 0)
    mesh = Mesh("picture", (Part(part.vertices, part.normals, part.uv, part.faces, picture),))
    view = render_orbit(mesh, [0], 0, 64, 40, 2.0, FLAT, gl)[0].astype(int)
    assert view[24, 24, 0] > 200 and view[40, 40, 1] > 200 and view[24, 40, :3].max() < 50


def test_same_bytes_every_time_and_in_every_process(gl: Renderer) -> None:
    mesh, azimuths = procedural_mesh(1), orbit_azimuths(4)
    first = render_orbit(mesh, azimuths, 10, 48, 33.8, 2.0, sky_light(2), gl)
    assert np.array_equal(first, render_orbit(mesh, azimuths, 10, 48, 33.8, 2.0, sky_light(2), gl))
    with open_renderer("moderngl") as other:
        assert np.array_equal(first, render_orbit(mesh, azimuths, 10, 48, 33.8, 2.0, sky_light(2), other))
    assert len({view.tobytes() for view in first}) == 4


def test_renderers_agree(gl: Renderer) -> None:
    mesh, azimuths = procedural_mesh(4), orbit_azimuths(3)
    with open_renderer("pyvista") as vtk:
        assert vtk.name == "pyvista"
        for light in (white_light(), sky_light(5)):
            a, b = (
                on_white(render_orbit(mesh, azimuths, 15, 64, 33.8, 2.0, light, one)).astype(float) for one in (gl, vtk)
            )
            assert -10 * np.log10(((a - b) ** 2).mean() / 255**2) > 27
        assert len({view.tobytes() for view in b}) == 3  # a missing render() gives the same view again and again


def test_objects_stay_inside_the_picture(gl: Renderer) -> None:
    for seed in range(3):
        for elevation in (-5, 30):
            alpha = render_orbit(procedural_mesh(seed), orbit_azimuths(6), elevation, 48, 33.8, 2.0, FLAT, gl)[..., 3]
            border = np.concatenate([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]])
            assert border.max() == 0 and (alpha > 0).mean() > 0.08


def test_antialiasing(gl: Renderer) -> None:
    mesh = Mesh("square", (square((0.013, 0.007, 0), 0.5, (0, 0, 0), "z"),))
    alpha = render_orbit(mesh, [20], 10, 64, 33.8, 2.0, FLAT, gl)[0, ..., 3]
    assert np.isin(alpha, [64, 128, 191, 192, 127]).any()


def test_light_falls_as_computed(gl: Renderer) -> None:
    """The shader's light equals the formula, for a surface under a directed environment."""
    picture = np.zeros((32, 64, 3), np.float32)
    picture[4:8, 30:40] = (30, 20, 10)
    light = Light(environment_light(picture).irradiance, headlight=0.3)
    mesh = Mesh("square", (square((0, 0, 0), 1.0, (128, 128, 128), "z"),))
    view = render_orbit(mesh, [0], 0, 32, 20, 2.0, light, gl)[0, 16, 16, :3]
    linear = irradiance(light, np.array([[0.0, 0, 1]]), np.array([[0.0, 0, 1]]))[0]
    expected = np.clip((128 / 255) ** 2.2 * linear, 0, 1) ** (1 / 2.2) * 255
    assert np.abs(view - expected).max() <= 2


def test_environment_harmonics() -> None:
    white = environment_light(np.ones((32, 64, 3), np.float32))
    normals = np.random.default_rng(0).normal(size=(50, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    assert np.allclose(irradiance(white, normals, normals), 0.85, atol=0.01)
    above = np.zeros((32, 64, 3), np.float32)
    above[:3] = 50
    top, side, bottom = irradiance(
        environment_light(above), np.array([(0.0, 1, 0), (1, 0, 0), (0, -1, 0)]), np.eye(3)
    ).mean(1)
    assert top > 2 * side and side > 1.5 * bottom
    with pytest.raises(UserError, match="no light"):
        environment_light(np.zeros((8, 16, 3), np.float32))


def test_hdr_file_and_its_turn(tmp_path: Path) -> None:
    picture = np.full((16, 32, 3), 0.1, np.float32)
    picture[7:9, 0:2, 0] = 80  # blue light in OpenCV's order from azimuth 0, which is +z
    cv2.imwrite(str(tmp_path / "a.hdr"), picture)
    at = np.array([(0.0, 0, 1), (1, 0, 0)])
    plain = irradiance(hdr_light(tmp_path / "a.hdr"), at, at)
    turned = irradiance(hdr_light(tmp_path / "a.hdr", turn=90), at, at)
    assert plain[0, 2] > 2 * plain[1, 2] and turned[1, 2] > 2 * turned[0, 2] and plain[0, 2] > 3 * plain[0, 0]
    (tmp_path / "b.hdr").write_text("no")
    with pytest.raises(UserError, match=r"b\.hdr"):
        hdr_light(tmp_path / "b.hdr")


def test_sky_lights_differ_and_are_seeded() -> None:
    assert np.array_equal(sky_light(1).irradiance, sky_light(1).irradiance)
    assert np.abs(sky_light(1).irradiance - sky_light(2).irradiance).max() > 0.05


def test_downsample_and_white() -> None:
    cell = np.zeros((1, 2, 2, 4), np.uint8)
    cell[0, 0, 0] = (200, 0, 0, 255)
    assert downsample(cell)[0, 0, 0].tolist() == [200, 0, 0, 64]
    assert on_white(np.array([200, 0, 0, 0], np.uint8)).tolist() == [255, 255, 255]


def test_torch_stays_out_of_the_renderers_process() -> None:
    code = "import svd.orbits.renderer, svd.orbits.render_gl, svd.orbits.render_vtk, sys; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_auto_falls_back_and_explains(monkeypatch: pytest.MonkeyPatch) -> None:
    class Starts:
        def __init__(self, name: str) -> None:
            self.name, self.failure = name, "no EGL here" if name == "moderngl" else None

        def close(self) -> None:
            closed.append(self.name)

    closed: list[str] = []
    monkeypatch.setattr(renderer_module, "_RendererProcess", Starts)
    with open_renderer("auto") as renderer:
        assert renderer.name == "pyvista"
    with pytest.raises(UserError, match=r"libegl1.*no EGL here"), open_renderer("moderngl"):
        pass
    assert closed == ["moderngl", "pyvista", "moderngl"]


def test_a_crash_is_one_clear_error(gl: Renderer) -> None:
    with open_renderer("moderngl") as renderer:
        renderer._child.kill()  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="renderer 'moderngl' failed"):
            render_orbit(procedural_mesh(0), [0], 0, 16, 33.8, 2.0, FLAT, renderer)
        half = io.BytesIO(pickle.dumps(bytes(1000))[:500])  # an answer that it was killed over
        with pytest.raises(ChildProcessError, match="code -9"), patch.object(renderer._child, "stdout", half):
            renderer._receive()  # type: ignore[attr-defined]
    broken = Mesh("broken", (square((0, 0, 0), 0.5, (1, 2, 3), "z"),))
    bad = Light(np.zeros((2, 3), np.float32))
    with pytest.raises(UserError, match="broken"):
        render_orbit(broken, [0], 0, 16, 33.8, 2.0, bad, gl)
