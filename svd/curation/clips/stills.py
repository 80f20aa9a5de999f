"""Stills of each clip: first, middle and last frame as JPEGs in a measured unit, and a thumbnail for the shard."""

from __future__ import annotations

from pathlib import Path

import cv2  # not PIL: frames are arrays here, as in all of curation
import numpy as np

JPEG_QUALITY = 90
THUMBNAIL_WIDTH = 192


def write_still(folder: Path, name: str, position: int, frame: np.ndarray) -> None:
    """Write one of the three frames (H, W, 3) uint8 RGB of a clip of the unit in `folder`; raises OSError."""
    path = _path(folder, name, position)
    encoded, data = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not encoded:
        raise OSError(f"{path.name}: the frame of shape {frame.shape} can't be written as JPEG")
    path.write_bytes(data.tobytes())


def read_stills(folder: Path, name: str) -> np.ndarray:
    """Read the first, middle and last frame of a clip, (3, H, W, 3) uint8 RGB; raises OSError."""
    return np.stack([read_still(folder, name, position) for position in range(3)])


def read_still(folder: Path, name: str, position: int) -> np.ndarray:
    """Read one of the three frames, (H, W, 3) uint8 RGB; raises OSError."""
    path = _path(folder, name, position)
    image = cv2.imread(str(path))
    if image is None:
        raise OSError(f"{path}: not a picture")
    return np.ascontiguousarray(image[..., ::-1])


def _path(folder: Path, name: str, position: int) -> Path:
    return folder / "frames" / f"{name}-{position}.jpg"


def encode_thumbnail(frame: np.ndarray) -> bytes:
    """Encode an (H, W, 3) uint8 RGB frame as JPEG, at most THUMBNAIL_WIDTH wide."""
    height, width = frame.shape[:2]
    scale = min(1.0, THUMBNAIL_WIDTH / width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
