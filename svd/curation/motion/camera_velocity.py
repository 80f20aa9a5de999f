"""Camera velocity at every frame, by direct alignment of tiny images.

Over half a second, a fast pan over a regular texture can't be told from its opposite; between neighbouring frames it
can. Each pair is aligned by a similarity (translation, scale, rotation), computed in closed form from the gradients.
Pixels that don't follow lose their weight.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 3
_RIDGE = np.diag(np.array([0.01, 0.01, 1.0, 1.0], np.float32))


def track_camera(images: np.ndarray) -> np.ndarray:
    """Return the motion of the content between neighbours of (n, h, w) luma images, (n - 1, 4) float32 per frame.

    Columns: dx and dy in image widths, relative growth, rotation in radians (clockwise).
    """
    x = images.astype(np.float32)
    count, height, width = x.shape
    if count < 2:
        return np.zeros((0, 4), np.float32)
    change = (x[1:] - x[:-1])[:, 1:-1, 1:-1].reshape(count - 1, -1)
    jacobian = _jacobian(x[1:] + x[:-1], height, width)
    motion = np.zeros((count - 1, 4), np.float32)
    for round_ in range(ROUNDS):
        weighted = jacobian
        if round_:
            left = np.abs(change + np.matmul(motion[:, None], jacobian)[:, 0])
            scale = left.mean(1, keepdims=True) + 0.5
            weighted = jacobian / (1 + (left / scale) ** 2)[:, None]
        normal = np.matmul(weighted, jacobian.transpose(0, 2, 1)) + _RIDGE
        motion = -np.linalg.solve(normal, np.matmul(weighted, change[..., None]))[..., 0]
    return motion / np.array([width, width, 1, 1], np.float32)


def _jacobian(doubled: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return how each inner pixel changes with dx, dy, growth and rotation around the centre, (n, 4, pixels)."""
    count = len(doubled)
    gx = (doubled[:, 1:-1, 2:] - doubled[:, 1:-1, :-2]).reshape(count, -1) * 0.25
    gy = (doubled[:, 2:, 1:-1] - doubled[:, :-2, 1:-1]).reshape(count, -1) * 0.25
    rows, columns = np.mgrid[1 : height - 1, 1 : width - 1].astype(np.float32)
    x, y = (columns - (width - 1) / 2).ravel(), (rows - (height - 1) / 2).ravel()
    return np.stack([gx, gy, gx * x + gy * y, gy * x - gx * y], 1)


def shake(velocity: np.ndarray, rate: float) -> float:
    """Return the root mean square of the part of (n, 2) velocities that changes within half a second.

    rate: values per second.
    """
    window = max(3, round(0.5 * rate) | 1)
    if len(velocity) < window:
        return 0.0
    kernel = np.ones(window) / window
    padded = np.pad(velocity, ((window // 2, window // 2), (0, 0)), mode="edge")
    slow = np.stack([np.convolve(padded[:, i], kernel, "valid") for i in range(2)], 1)
    return float(np.sqrt(((velocity - slow) ** 2).sum(1).mean()))
