"""The drawings of the synthetic worlds: seamless background tiles and shapes, textured or plain, all antialiased.

Everything is a function of its arguments and of the given generator; nothing is read from disk.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (244, 132, 28),
    "yellow": (245, 214, 50),
    "green": (46, 160, 67),
    "blue": (42, 96, 214),
    "purple": (128, 58, 180),
    "pink": (240, 128, 178),
    "white": (238, 238, 238),
    "grey": (118, 118, 122),
    "brown": (122, 78, 44),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("checks", "stripes", "dots", "bricks", "waves", "grid", "clouds")

# Of the plain world's backgrounds: waves across a tile, and the mean and the swing of their brightness. Backgrounds are
# darker than objects, and the waves long enough that a fast pan between two frames can't be taken for its opposite.
SMOOTH_WAVES = 4
SMOOTH_BRIGHTNESS = 0.8
SMOOTH_CONTRAST = 0.3

_SUPERSAMPLING = 4


def fractal_noise(size: int, exponent: float, generator: np.random.Generator) -> Floats:
    """Make seamless 1/f**exponent noise, (size, size), of zero mean and unit deviation."""
    frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(size), np.fft.fftfreq(size)))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(generator.standard_normal((size, size))) / frequency**exponent
    noise = np.fft.irfft2(spectrum, s=(size, size))
    return np.asarray((noise - noise.mean()) / noise.std(), np.float32)


def _halved(pattern: NDArray[Any]) -> Floats:
    """Average a pattern over 2 x 2 pixels."""
    size = pattern.shape[0] // 2
    resized = cv2.resize(np.asarray(pattern, np.float32), (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(resized, np.float32)


def _coverage(kind: str, size: int, generator: np.random.Generator) -> Floats:
    """Return the share of the second colour in each pixel of a seamless background tile, (size, size) in [0, 1]."""
    if kind == "clouds":
        return np.asarray(1 / (1 + np.exp(-2.5 * fractal_noise(size, 1.9, generator))), np.float32)
    side = size * 2  # hard edges are drawn at twice the size and averaged
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    n = int(generator.integers(2, 5)) * 2
    u, v = (x * n) % 1, (y * n) % 1
    if kind == "checks":
        pattern = (np.floor(x * n) + np.floor(y * n)) % 2
    elif kind == "stripes":
        across = int(generator.choice([-2, -1, 1, 2]))
        pattern = ((x * n + y * across * n / 2) % 1) < 0.5
    elif kind == "dots":
        pattern = (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.09
    elif kind == "bricks":
        shifted = (x * n / 2 + np.floor(y * n) / 2) % 1
        pattern = (shifted < 0.06) | (v < 0.12)
    elif kind == "waves":
        pattern = ((y * n + 0.35 * np.sin(2 * np.pi * 3 * x)) % 1) < 0.5
    else:
        pattern = (u < 0.14) | (v < 0.14)
    return _halved(pattern)


def background_tile(kind: str, colour: str, size: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a seamless (size, size, 3) uint8 RGB tile: two shades of `colour`, mottled so that optical flow works."""
    base = np.array(COLOURS[colour], np.float32) * generator.uniform(0.85, 1.1)
    shade = base * 0.45 if base.mean() > 110 else base * 0.6 + 95
    cover = _coverage(kind, size, generator)[..., None]
    mottling = 1 + 0.13 * fractal_noise(size, 0.9, generator)[..., None]
    return np.clip((base * (1 - cover) + shade * cover) * mottling, 0, 255).astype(np.uint8)


def smooth_tile(kind: str, colour: str, size: int) -> NDArray[np.uint8]:
    """Draw a seamless (size, size, 3) uint8 RGB tile of the plain world: one colour whose brightness is a sine.

    kind: "checks" (waves along both axes) or "stripes" (oblique waves), `SMOOTH_WAVES` of them across the tile.
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) * (2 * np.pi * SMOOTH_WAVES / size)
    wave = np.sin(x) * np.sin(y) if kind == "checks" else np.sin(x + y * np.float32(2 / SMOOTH_WAVES))
    shade = SMOOTH_BRIGHTNESS * (1 + SMOOTH_CONTRAST * wave[..., None])
    return np.clip(np.array(COLOURS[colour], np.float32) * shade, 0, 255).astype(np.uint8)


def _outline(shape: str) -> NDArray[np.float64]:
    """Return the corners of a polygonal shape in [-1, 1], y down, (N, 2)."""
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.78
    if shape == "diamond":
        return np.array([(0, -0.98), (0.72, 0), (0, 0.98), (-0.72, 0)])
    if shape == "triangle":
        return np.array([(0, -0.92), (0.92, 0.75), (-0.92, 0.75)])
    if shape == "cross":
        a, b = 0.3, 0.9
        half = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        return np.array(half + [(-x, -y) for x, y in half])
    if shape == "star":
        angle = np.arange(10) * np.pi / 5 - np.pi / 2
        radius = np.where(np.arange(10) % 2, 0.4, 0.98)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    t = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 18, (y - 2) / 17], 1)


def shape_mask(shape: str, size: int, shrink: float = 1.0) -> Floats:
    """Draw the antialiased coverage of a shape that fills a square, (size, size) in [0, 1]."""
    side = size * _SUPERSAMPLING
    canvas = np.zeros((side, side), np.uint8)
    middle = (side // 2, side // 2)
    if shape in ("circle", "ring"):
        cv2.circle(canvas, middle, int(side * 0.45 * shrink), 255, -1)
        if shape == "ring":
            cv2.circle(canvas, middle, int(side * 0.22 * (2 - shrink)), 0, -1)
    else:
        corners = (_outline(shape) * shrink * 0.5 + 0.5) * side
        cv2.fillPoly(canvas, [np.round(corners).astype(np.int32)], 255)
    coverage = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(coverage, np.float32) / np.float32(255)


def _object_pattern(texture: str, size: int) -> Floats:
    side = size * 2
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    if texture == "striped":
        pattern = ((x + y) * 4 % 1) < 0.5
    elif texture == "dotted":
        pattern = (x * 6 % 1 - 0.5) ** 2 + (y * 6 % 1 - 0.5) ** 2 < 0.08
    elif texture == "checkered":
        pattern = (np.floor(x * 6) + np.floor(y * 6)) % 2 > 0
    else:
        pattern = np.zeros_like(x, bool)
    return _halved(pattern)


def sprite(shape: str, colour: str, texture: str, size: int, generator: np.random.Generator) -> Floats:
    """Draw a textured shape with a dark rim.

    Returns premultiplied RGBA, (size, size, 4) float32, colours in [0, 255], alpha in [0, 1].
    """
    base = np.array(COLOURS[colour], np.float32) * generator.uniform(0.92, 1.06)
    second = base * 0.35 if base.mean() > 130 else base * 0.4 + 150
    pattern = _object_pattern(texture, size)[..., None]
    light = np.linspace(1.12, 0.82, size, dtype=np.float32)[:, None, None]
    fill = (base * (1 - pattern) + second * pattern) * light
    inside = shape_mask(shape, size, 0.86)[..., None]
    alpha = shape_mask(shape, size)[..., None]
    colours = np.clip(fill * inside + 22 * (1 - inside), 0, 255)
    return np.concatenate([colours * alpha, alpha], -1).astype(np.float32)


def flat_sprite(shape: str, colour: str, size: int) -> Floats:
    """Draw a shape of one even colour without a rim; returns premultiplied RGBA as `sprite` does."""
    alpha = shape_mask(shape, size)[..., None]
    return np.concatenate([np.array(COLOURS[colour], np.float32) * alpha, alpha], -1).astype(np.float32)
