"""The pyvista renderer: VTK off screen, for machines where moderngl finds no EGL.

VTK's own lights are off. The light of svd/orbits/render.py is computed at the vertices and multiplied with the texture,
so both renderers show the same object. They differ in antialiasing and in the shading between vertices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from svd.orbits.meshes import Mesh, Part
from svd.orbits.render import GAMMA, SUPERSAMPLING, Light, downsample, irradiance


class PyVista:
    """A renderer with VTK; usable only by the thread that made it."""

    name = "pyvista"

    def __init__(self, module: Any) -> None:
        self._pyvista = module

    def close(self) -> None:
        """Close all windows."""
        self._pyvista.close_all()

    def views(self, mesh: Mesh, eyes: NDArray[np.float64], size: int, fov: float, light: Light) -> NDArray[np.uint8]:
        """Render the mesh as seen from each of `eyes` (V, 3) towards the origin, (V, size, size, 4)."""
        side = size * SUPERSAMPLING
        plotter = self._pyvista.Plotter(off_screen=True, window_size=(side, side), lighting="none")
        surfaces = [self._add(plotter, part) for part in mesh.parts]
        images = np.empty((len(eyes), side, side, 4), np.uint8)
        for i, eye in enumerate(eyes):
            for surface, part in zip(surfaces, mesh.parts, strict=True):
                surface["light"] = _vertex_light(part, eye, light)
            plotter.camera.position, plotter.camera.focal_point = tuple(eye), (0, 0, 0)
            plotter.camera.up = (0, 1, 0) if abs(eye[1]) < 0.9999 * np.linalg.norm(eye) else (0, 0, -np.sign(eye[1]))
            plotter.camera.view_angle = fov
            plotter.reset_camera_clipping_range()
            plotter.render()  # a screenshot alone shows the view before
            images[i] = plotter.screenshot(return_img=True, transparent_background=True)
        plotter.close()
        return downsample(images)

    def _add(self, plotter: Any, part: Part) -> Any:
        faces = np.concatenate([np.full((len(part.faces), 1), 3), part.faces], 1)
        surface = self._pyvista.PolyData(part.vertices, faces.ravel())
        surface.active_texture_coordinates = np.stack([part.uv[:, 0], 1 - part.uv[:, 1]], 1)
        surface["light"] = np.full((len(part.vertices), 3), 255, np.uint8)
        texture = self._pyvista.Texture(np.ascontiguousarray(part.texture))
        texture.repeat, texture.interpolate = True, True
        plotter.add_mesh(surface, scalars="light", rgb=True, texture=texture, lighting=False)
        return surface


def _vertex_light(part: Part, eye: NDArray[np.float64], light: Light) -> NDArray[np.uint8]:
    normals = part.normals.astype(np.float64)
    towards = eye - part.vertices
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    shade = np.clip(irradiance(light, normals, towards), 0, 1) ** (1 / GAMMA)
    return np.round(shade * 255).astype(np.uint8)


def open_pyvista() -> PyVista | str:
    """Open the renderer, or return why there is none."""
    try:
        import pyvista
    except ImportError as error:
        return str(error)
    return PyVista(pyvista)
