"""Camera motion and amount of motion of frames in memory, by the same functions as curation (§3.1, App. C).

Curation looks at a film's frames while it decodes them; a generated clip has few frames, so every pair of neighbours
within half a second counts here.
"""

from __future__ import annotations

import itertools

import cv2
import numpy as np

from svd.curation.base.types import CameraMotion
from svd.curation.clips.samples import points_for_fit
from svd.curation.motion.camera import classify, fit_similarity
from svd.curation.motion.camera_velocity import track_camera
from svd.curation.motion.flow import farneback, grid_size, motion_score
from svd.media.video import Frames

SHORT_SIDE = 64  # of the images that flow is computed on
TINY = (48, 32)  # width and height of those that are aligned directly


def _luma(frames: Frames, size: tuple[int, int]) -> list[np.ndarray]:
    grey = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames)
    return [cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in grey]


def camera_motion(frames: Frames, fps: float) -> CameraMotion:
    """Return the camera motion of a clip (T, H, W, 3) uint8."""
    size = grid_size(frames.shape[2], frames.shape[1], SHORT_SIDE)
    images, step = _luma(frames, size), max(1, round(fps / 4))
    pairs = list(zip(images[:-step], images[step:], strict=True))
    fits = [fit_similarity(*points_for_fit(farneback(a, b), a), step / fps) for a, b in pairs]
    velocity = track_camera(np.stack(_luma(frames, TINY))) * fps
    return classify(velocity, fps, fits)


def mean_flow(frames: Frames, fps: float) -> float:
    """Return the mean length of the optical flow between neighbours, in frame widths per second."""
    size = grid_size(frames.shape[2], frames.shape[1], SHORT_SIDE)
    images = _luma(frames, size)
    flows = np.stack([farneback(a, b) for a, b in itertools.pairwise(images)])
    return motion_score(flows) * fps / size[0]
