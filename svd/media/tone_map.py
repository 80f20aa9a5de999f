"""HDR pictures on an ordinary screen: PQ and HLG (BT.2100) to BT.709, bright parts compressed by BT.2390's knee.

The screen's full light is that of diffuse white, 203 cd/m² (BT.2408). What is darker than the knee, about 90 cd/m²,
keeps its luminance exactly, and everything up to PEAK is squeezed into the rest.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Hdr = Literal["PQ", "HLG"]

PEAK = 1000.0  # cd/m²; what most films are mastered for, and HLG's nominal display
WHITE = 203.0  # cd/m² of the screen's brightest value
SCREEN_GAMMA = 2.4  # BT.1886
_BRIGHTEST = 10000.0  # cd/m²; PQ's largest value

_BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
_BT2020_TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)


def tone_map(codes: NDArray[np.uint16], hdr: Hdr) -> NDArray[np.uint8]:
    """Convert R'G'B' (H, W, 3), full range, in BT.2020's colours, to RGB (H, W, 3) of a BT.709 screen."""
    light = _light(hdr)[codes]
    if hdr == "HLG":
        # The picture is of the scene: a display of 1000 cd/m² shows it with a gamma of 1.2 on its luminance.
        light *= (cv2.transform(light, _BT2020_LUMA[None]) ** 0.2)[..., None] * np.float32(PEAK)
    red, green, blue = cv2.split(light)
    light *= _gain()[_index(cv2.max(cv2.max(red, green), blue) / _BRIGHTEST)][..., None]
    return _screen()[_index(cv2.transform(light, _BT2020_TO_BT709))]


def _index(share: NDArray[Any]) -> NDArray[np.uint16]:
    """Return where a table has the light `share`, clipped to [0, 1]: by its root, so that dark steps are small."""
    return (np.sqrt(np.clip(share, 0, 1)) * 65535 + 0.5).astype(np.uint16)


def from_pq(signal: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the luminance, in cd/m², of a PQ signal in [0, 1] (BT.2100, table 4)."""
    root = signal ** (1 / 78.84375)
    return 10000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)


def to_pq(luminance: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the PQ signal in [0, 1] of a luminance in cd/m²."""
    root = (luminance / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * root) / (1 + 18.6875 * root)) ** 78.84375


def from_hlg(signal: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the light of the scene, in [0, 1], of an HLG signal in [0, 1] (BT.2100, table 5)."""
    bright = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
    return np.where(signal <= 0.5, signal**2 / 3, bright)


@functools.cache
def _light(hdr: Hdr) -> NDArray[np.float32]:
    """Return light by code: of PQ in cd/m², of HLG that of the scene."""
    signal = np.arange(65536) / 65535
    return (from_pq(signal) if hdr == "PQ" else from_hlg(signal)).astype(np.float32)


@functools.cache
def _gain() -> NDArray[np.float32]:
    """Return the factor from cd/m² to the screen's light in [0, 1], by `_index` of the largest of R, G, B.

    It is the knee of BT.2390, section 5.4.
    """
    top, white = to_pq(np.array([PEAK, WHITE]))
    brightness = _BRIGHTEST * (np.maximum(np.arange(65536), 1) / 65535) ** 2
    signal = np.minimum(to_pq(brightness) / top, 1)
    most = white / top
    knee = 1.5 * most - 0.5
    t = np.maximum(signal - knee, 0) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    mapped = from_pq(np.where(signal < knee, signal, spline) * top)
    return (mapped / brightness / WHITE).astype(np.float32)


@functools.cache
def _screen() -> NDArray[np.uint8]:
    """Return the screen's value by `_index` of its light."""
    return np.rint(255 * (np.arange(65536) / 65535) ** (2 / SCREEN_GAMMA)).astype(np.uint8)
