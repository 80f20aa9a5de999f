"""Camera motion without weights: a robust global fit to the flow between samples, and rules on what it says over time.

A camera that turns, zooms or rolls moves the whole picture by a similarity: translation, scale and rotation. The
fit weights each point by how well it follows (iterated, so that moving objects lose their vote), and what it leaves
is object motion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from svd.curation.types import CameraLabel, CameraMotion

CAPTIONS: dict[CameraLabel, str] = {
    "static": "the camera is static",
    "pan-left": "the camera pans left",
    "pan-right": "the camera pans right",
    "tilt-up": "the camera tilts up",
    "tilt-down": "the camera tilts down",
    "zoom-in": "the camera zooms in",
    "zoom-out": "the camera zooms out",
    "roll": "the camera rolls",
    "handheld": "the camera shakes",
    "object-motion": "the camera is static while things move",
    "unknown": "the camera moves",
}
STILL = 0.012  # frame widths a second below which nothing moves


@dataclass(frozen=True)
class GlobalFit:
    """Similarity between two samples, a second: dx and dy of the content in frame widths, log scale, radians clockwise;
    residual: mean flow left, frame widths; moving: share of points that don't follow."""

    dx: float
    dy: float
    zoom: float
    roll: float
    residual: float
    moving: float


def camera_caption(label: CameraLabel) -> str:
    """The words of a camera label, for captions."""
    return CAPTIONS[label]


def fit_similarity(flow: np.ndarray, weight: np.ndarray, seconds: float) -> GlobalFit:
    """Fit flow (h, w, 2), in pixels over `seconds`, by a similarity around the middle; weight (h, w): trust in each
    vector.
    """
    height, width = flow.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float64)
    x, y = (x - (width - 1) / 2).ravel() / width, (y - (height - 1) / 2).ravel() / width
    u, v = flow[..., 0].astype(np.float64).ravel() / width, flow[..., 1].astype(np.float64).ravel() / width
    trust = weight.astype(np.float64).ravel() + 1e-6
    solution, left = np.zeros(4), np.hypot(u, v)
    for round_ in range(5):
        scale = max(1.5 * _median(left, trust), 0.25 / width) * (2.0 if round_ < 2 else 1.0)
        w = trust / (1 + (left / scale) ** 2) if round_ else trust
        solution = _solve(x, y, u, v, w)
        dx, dy, s, r = solution
        left = np.hypot(u - dx - s * x + r * y, v - dy - s * y - r * x)
    bound = max(0.6 / width, 3 * _median(left, trust))
    step = 1 / seconds
    return GlobalFit(
        dx=solution[0] * step,
        dy=solution[1] * step,
        zoom=math.log(max(1 + solution[2], 1e-3)) * step,
        roll=math.atan2(solution[3], 1 + solution[2]) * step,
        residual=float((left * trust).sum() / trust.sum()) * step,
        moving=float(trust[left > bound].sum() / trust.sum()),
    )


def _median(values: np.ndarray, weight: np.ndarray) -> float:
    order = np.argsort(values)
    total = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def _solve(x: np.ndarray, y: np.ndarray, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Weighted least squares of u = dx + s x - r y, v = dy + s y + r x; returns (dx, dy, s, r)."""
    total = w.sum()
    mx, my, mu, mv = ((w * a).sum() / total for a in (x, y, u, v))
    x, y, u, v = x - mx, y - my, u - mu, v - mv
    energy = (w * (x * x + y * y)).sum() + 1e-12
    s = (w * (u * x + v * y)).sum() / energy
    r = (w * (v * x - u * y)).sum() / energy
    return np.array([mu - s * mx + r * my, mv - s * my - r * mx, s, r])


def classify(fits: list[GlobalFit]) -> CameraMotion:
    """The camera label of a clip from the fits of its sampled pairs."""
    if not fits:
        return CameraMotion("unknown", 0.0)
    table = np.array([[f.dx, f.dy, f.zoom, f.roll, f.residual, f.moving] for f in fits])
    dx, dy, zoom, roll, residual, moving = np.median(table, 0)
    shake = float(np.hypot(*(table[:, :2] - table[:, :2].mean(0)).T).mean()) if len(fits) > 1 else 0.0
    # Displacement at the border of the picture, so that a zoom or a roll can be compared with a pan.
    strengths: dict[CameraLabel, float] = {
        "pan-right" if dx < 0 else "pan-left": abs(dx),
        "tilt-down" if dy < 0 else "tilt-up": abs(dy),
        "zoom-in" if zoom > 0 else "zoom-out": 0.35 * abs(zoom),
        "roll": 0.35 * abs(roll),
    }
    best = max(strengths, key=lambda k: strengths[k])
    strength = strengths[best]
    label: CameraLabel
    if max(strength, shake) < STILL:
        label = "object-motion" if residual > STILL / 2 else "static"
        confidence = 1 - max(strength, shake) / STILL
    elif shake > strength:
        label, confidence = "handheld", 1 - strength / (shake + 1e-9)
    else:
        second = sorted(strengths.values())[-2]
        label, confidence = best, 1 - max(second, shake) / strength
    return CameraMotion(
        label,
        round(float(confidence), 4),
        float(-dx),
        float(dy),
        float(zoom),
        float(roll),
        shake,
        float(residual),
        float(moving),
    )
