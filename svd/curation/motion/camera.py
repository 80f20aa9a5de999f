"""Camera motion without learned weights: robust global fits, and rules that turn them into a label.

A camera that turns, zooms or rolls moves the whole image by a similarity: translation, scale and rotation. The fit
weights each point by how well it follows. It is iterated, so that moving objects lose their influence. The residual is
object motion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from svd.curation.base.types import CameraLabel, CameraMotion
from svd.curation.motion.camera_velocity import shake

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
STILL = 0.008  # frame widths per second; a slower camera is static
MOVING = 0.003  # mean flow in frame widths per second; above it something moves in front of a static camera
STANDS = 0.3  # share of textured points at rest; above it the camera is static, however much moves in front of it
TEXTURE = 0.5  # trust of a point; above it the point counts as textured
SLOW = 0.06  # frame widths per second; below it flow between samples is more exact than tracking


@dataclass(frozen=True)
class GlobalFit:
    """The similarity between two samples, per second.

    dx, dy: motion of the content in frame widths. zoom: logarithm of the scale. roll: radians clockwise.
    residual: mean flow that is left, in frame widths. moving: share of points that don't follow. still: share of
    textured points at rest.
    """

    dx: float
    dy: float
    zoom: float
    roll: float
    residual: float
    moving: float
    still: float


def camera_caption(label: CameraLabel) -> str:
    """Return the caption of a camera label."""
    return CAPTIONS[label]


def fit_similarity(flow: np.ndarray, weight: np.ndarray, seconds: float) -> GlobalFit:
    """Fit a similarity around the centre to flow (h, w, 2), in pixels over `seconds`.

    weight: (h, w), trust in each vector, at least 0.
    """
    height, width = flow.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float64)
    x, y = (x - (width - 1) / 2).ravel() / width, (y - (height - 1) / 2).ravel() / width
    u, v = flow[..., 0].astype(np.float64).ravel() / width, flow[..., 1].astype(np.float64).ravel() / width
    trust = weight.astype(np.float64).ravel() + 1e-6
    solution, left, w = np.zeros(4), np.hypot(u, v), trust
    scale = np.inf
    for _ in range(7):
        solution = _solve(x, y, u, v, w)
        dx, dy, s, r = solution
        left = np.hypot(u - dx - s * x + r * y, v - dy - s * y - r * x)
        # The scale shrinks each round, so that a large object, which at first seems to follow, loses its influence too.
        scale = max(min(1.5 * _median(left, trust), 0.6 * scale), 0.25 / width)
        w = trust / (1 + (left / scale) ** 2) ** 2
    bound = max(0.6 / width, 3 * _median(left, trust))
    step = 1 / seconds
    return GlobalFit(
        dx=solution[0] * step,
        dy=solution[1] * step,
        zoom=math.log(max(1 + solution[2], 1e-3)) * step,
        roll=math.atan2(solution[3], 1 + solution[2]) * step,
        residual=float((left * trust).sum() / trust.sum()) * step,
        moving=float(trust[left > bound].sum() / trust.sum()),
        still=_share(np.hypot(u, v) < STILL * seconds / 2, trust),
    )


def _share(chosen: np.ndarray, trust: np.ndarray) -> float:
    """Return the share of textured points that are chosen; without texture flow is near 0 whatever the camera does."""
    seen = trust > TEXTURE
    return float((chosen & seen).sum() / seen.sum()) if seen.sum() >= 8 else 0.0


def _median(values: np.ndarray, weight: np.ndarray) -> float:
    """Return the weighted median."""
    order = np.argsort(values)
    total = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def _solve(x: np.ndarray, y: np.ndarray, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Solve u = dx + s x - r y, v = dy + s y + r x by weighted least squares; return (dx, dy, s, r)."""
    total = w.sum()
    mx, my, mu, mv = ((w * a).sum() / total for a in (x, y, u, v))
    x, y, u, v = x - mx, y - my, u - mu, v - mv
    energy = (w * (x * x + y * y)).sum() + 1e-12
    s = (w * (u * x + v * y)).sum() / energy
    r = (w * (v * x - u * y)).sum() / energy
    return np.array([mu - s * mx + r * my, mv - s * my - r * mx, s, r])


def classify(velocity: np.ndarray, rate: float, fits: list[GlobalFit]) -> CameraMotion:
    """Classify the camera motion of a clip.

    velocity: (n, 4) from `track_camera` between its frames, times `rate`, the frames per second. fits: of its sampled
    pairs; they are finer where motion is slow, and they tell what doesn't follow the camera.
    """
    if not len(velocity) and not fits:
        return CameraMotion("unknown", 0.0)
    rows = [[f.dx, f.dy, f.zoom, f.roll, f.residual, f.moving, f.still] for f in fits] or [[0.0] * 7]
    middle = np.median(np.array(rows), 0)
    typical = np.median(velocity, 0) if len(velocity) else middle[:4]
    use = middle[:4] if fits and max(_strengths(typical).values()) < SLOW else typical
    moving, still = float(middle[5]), float(middle[6])
    # The upper quartile: something that moves for a quarter of the time counts.
    residual = float(np.quantile([row[4] for row in rows], 0.75))
    trembling = shake(velocity[:, :2], rate)
    label, confidence = _label(_strengths(use), trembling, residual, still)
    dx, dy, zoom, roll = (round(float(v), 5) for v in use)
    return CameraMotion(
        label, round(confidence, 4), -dx, dy, zoom, roll, round(trembling, 5), round(residual, 5), round(moving, 5)
    )


def _strengths(motion: np.ndarray) -> dict[CameraLabel, float]:
    """Return the displacement per second of each kind of motion: at the centre (pan, tilt) or border (zoom, roll)."""
    dx, dy, zoom, roll = (float(v) for v in motion)
    return {
        "pan-right" if dx < 0 else "pan-left": abs(dx),
        "tilt-down" if dy < 0 else "tilt-up": abs(dy),
        "zoom-in" if zoom > 0 else "zoom-out": 0.35 * abs(zoom),
        "roll": 0.35 * abs(roll),
    }


def _label(
    strengths: dict[CameraLabel, float], trembling: float, residual: float, still: float
) -> tuple[CameraLabel, float]:
    """Return the label and its confidence in [0, 1], the margin of the rule that decides."""
    best = max(strengths, key=lambda k: strengths[k])
    strength = max(strengths.values())
    if still > STANDS or max(strength, trembling / 2) < STILL:
        margin = max(still, 1 - max(strength, trembling / 2) / STILL)
        return "object-motion" if residual > MOVING else "static", min(margin, 1.0)
    if trembling > strength:
        return "handheld", 1 - strength / trembling
    second = sorted(strengths.values())[-2]
    return best, 1 - max(second, trembling) / strength
