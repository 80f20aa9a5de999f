"""Orbits around a mesh (§4.5, D.6): cameras, light and images; svd/orbits/renderer.py opens a renderer.

The light is white or comes from an environment: its irradiance in nine spherical harmonics (Ramamoorthi and Hanrahan
2001), exact to about 3 % for matt surfaces, plus a share of light from the camera. Both renderers give straight-alpha
RGBA, averaged over 2 x 2 samples per pixel. Equal inputs give equal bytes on the same machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from svd.core.errors import UserError
from svd.orbits.meshes import Mesh

SUPERSAMPLING = 2
GAMMA = 2.2


@dataclass(frozen=True)
class Light:
    """The light of a scene.

    irradiance: (9, 3) spherical-harmonics coefficients of the light on a surface by its normal, 1 = white on white;
    headlight: share of the light that comes from the camera instead.
    """

    irradiance: NDArray[np.float32]
    headlight: float = 0.25


class Renderer(Protocol):
    """A renderer of meshes; `name` stands in reports."""

    name: str

    def views(self, mesh: Mesh, eyes: NDArray[np.float64], size: int, fov: float, light: Light) -> NDArray[np.uint8]:
        """Render the mesh as seen from each of `eyes` (V, 3) towards the origin, (V, size, size, 4) uint8 RGBA."""


def orbit_azimuths(views: int) -> NDArray[np.float64]:
    """Return the azimuths of a full circle in degrees, (views,); the last is 0, the conditioning view (SV3D's order).

    For example 90, 180, 270, 0 for four views.
    """
    return np.linspace(0, 360, views + 1)[1:] % 360


def eye_positions(azimuths: Sequence[float] | NDArray[np.float64], elevation: float, radius: float) -> NDArray[Any]:
    """Return the camera's positions for azimuths and an elevation in degrees, (V, 3).

    Azimuth 0 is +z, 90 is +x, and y is up.
    """
    azimuth, up = np.deg2rad(np.asarray(azimuths, np.float64)), np.deg2rad(elevation)
    across = np.cos(up) * radius
    height = np.full_like(azimuth, np.sin(up) * radius)
    return np.stack([across * np.sin(azimuth), height, across * np.cos(azimuth)], -1)


def _harmonics(normals: NDArray[np.float64]) -> NDArray[np.float64]:
    x, y, z = np.moveaxis(normals, -1, 0)
    one = np.ones_like(x)
    terms = (0.282095 * one, 0.488603 * y, 0.488603 * z, 0.488603 * x, 1.092548 * x * y, 1.092548 * y * z)
    more = (0.315392 * (3 * z * z - 1), 1.092548 * x * z, 0.546274 * (x * x - y * y))
    return np.stack([*terms, *more], -1)


def white_light(headlight: float = 0.25) -> Light:
    """Make uniform white light from everywhere plus a share from the camera: the benchmark's light."""
    coefficients = np.zeros((9, 3), np.float32)
    coefficients[0] = 1 / 0.282095
    return Light(coefficients, headlight)


def environment_light(image: NDArray[np.float32], headlight: float = 0.0, turn: float = 0.0) -> Light:
    """Make the light of an equirectangular image, (h, 2h, 3) linear, exposed to a mean irradiance of 0.85.

    turn: rotation of the environment about the vertical axis in degrees. Raises UserError for a black image.
    """
    small = cv2.resize(np.asarray(image, np.float32), (64, 32), interpolation=cv2.INTER_AREA).astype(np.float64)
    v, u = np.meshgrid((np.arange(32) + 0.5) / 32, (np.arange(64) + 0.5) / 64, indexing="ij")
    polar, around = np.pi * v, 2 * np.pi * u + np.deg2rad(turn)
    direction = np.stack([np.sin(polar) * np.sin(around), np.cos(polar), np.sin(polar) * np.cos(around)], -1)
    weight = np.sin(polar) / np.sin(polar).sum() * 4 * np.pi
    basis = _harmonics(direction)
    radiance = np.einsum("hwk,hwc,hw->kc", basis, small, weight)
    falloff = np.array([1.0] + [2 / 3] * 3 + [1 / 4] * 5)  # the cosine lobe's coefficients over pi
    irradiance = radiance * falloff[:, None]
    mean = irradiance[0].mean() * 0.282095
    if not np.isfinite(mean) or mean <= 0:
        raise UserError("the environment picture is black or not finite; it gives no light")
    return Light((irradiance * (0.85 / mean)).astype(np.float32), headlight)


def sky_light(seed: int | Sequence[int]) -> Light:
    """Make a seeded environment: tinted sky, horizon and ground, a sun, and a window of light somewhere."""
    generator = np.random.default_rng(seed)
    v, u = np.meshgrid((np.arange(32) + 0.5) / 32, (np.arange(64) + 0.5) / 64, indexing="ij")
    sky, horizon, ground = (generator.uniform(0.55, 1, 3) * level for level in (0.9, 1.1, 0.45))
    upper = np.clip(1 - 2 * v, 0, 1)[..., None] ** 0.6
    lower = np.clip(2 * v - 1, 0, 1)[..., None] ** 0.4
    image = horizon + (sky - horizon) * upper + (ground - horizon) * lower
    polar, around = np.pi * v, 2 * np.pi * u
    direction = np.stack([np.sin(polar) * np.sin(around), np.cos(polar), np.sin(polar) * np.cos(around)], -1)
    for strength, width in ((8.0, 0.93), (3.0, 0.8)):
        angle, height = generator.uniform(0, 2 * np.pi), generator.uniform(0.2, 0.9)
        towards = np.array([np.sin(angle) * np.sqrt(1 - height**2), height, np.cos(angle) * np.sqrt(1 - height**2)])
        glow = np.clip((direction @ towards - width) / (1 - width), 0, 1)[..., None]
        image = image + strength * generator.uniform(0.3, 1) * glow * generator.uniform(0.85, 1, 3)
    return environment_light(image.astype(np.float32))


def hdr_light(path: Path, turn: float = 0.0) -> Light:
    """Make the light of a Radiance .hdr file; raises UserError when it can't be read."""
    # Not through svd.media.images: its values are linear light beyond [0, 1].
    image = cv2.imread(str(path), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(f"{path}: not a readable .hdr picture")
    return environment_light(np.asarray(image[..., ::-1], np.float32), turn=turn)


def irradiance(light: Light, normals: NDArray[np.float64], towards_camera: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the linear light on surfaces with the given unit normals, (..., 3); the shader computes the same."""
    surroundings = np.maximum(_harmonics(normals) @ light.irradiance.astype(np.float64), 0)
    facing = np.maximum((normals * towards_camera).sum(-1, keepdims=True), 0)
    return (1 - light.headlight) * surroundings + light.headlight * facing


def look_at(eye: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the matrix (4, 4) from world to camera at `eye` looking at the origin, +y up, the camera along -z."""
    back = eye / np.linalg.norm(eye)
    up = np.array([0.0, 1, 0]) if abs(back[1]) < 0.9999 else np.array([0.0, 0, -np.sign(back[1])])
    right = np.cross(up, back)
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([right, np.cross(back, right), back])
    matrix[:3, 3] = -matrix[:3, :3] @ eye
    return matrix


def downsample(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Average 2 x 2 samples of straight-alpha RGBA, weighing colours by alpha, (V, 2s, 2s, 4) -> (V, s, s, 4)."""
    v, side, _, _ = images.shape
    cells = images.reshape(v, side // 2, 2, side // 2, 2, 4).astype(np.float32)
    alpha = cells[..., 3:].sum((2, 4))
    colour = (cells[..., :3] * cells[..., 3:]).sum((2, 4)) / np.maximum(alpha, 1e-6)
    return np.round(np.concatenate([colour, alpha / SUPERSAMPLING**2], -1)).astype(np.uint8)


def on_white(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Composite straight-alpha RGBA on white, (..., 4) -> (..., 3)."""
    alpha = images[..., 3:].astype(np.float32) / 255
    return np.round(images[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def render_orbit(
    mesh: Mesh,
    azimuths_deg: Sequence[float] | NDArray[np.float64],
    elevation_deg: float,
    size: int,
    fov: float,
    radius: float,
    light: Light,
    renderer: Renderer,
) -> NDArray[np.uint8]:
    """Render a normalised mesh from an orbit at constant elevation, (V, size, size, 4) uint8 straight-alpha RGBA.

    fov: vertical field of view in degrees; radius: distance of the camera, the mesh's longest side being 1.
    """
    return renderer.views(mesh, eye_positions(azimuths_deg, elevation_deg, radius), size, fov, light)
