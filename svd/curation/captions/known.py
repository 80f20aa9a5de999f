"""Captions that need no network (§3.1): `sidecar` came with the source, `motion` states the measured camera motion.

They are computed while a source is measured, so they are known before any captioner runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from svd.curation.base.types import CameraLabel
from svd.curation.captions.base import MOTION, SIDECAR
from svd.curation.motion.camera import camera_caption
from svd.sources.listing import SceneCaption


def known_captions(
    scenes: Sequence[SceneCaption], camera: CameraLabel, start_seconds: float, end_seconds: float, zero: float
) -> dict[str, str]:
    """Return the captions of the clip [start, end), by name, of a source whose clock starts at `zero` seconds.

    `motion` follows from the camera label. `sidecar` is the caption of the scene that overlaps the clip most; a caption
    of the whole source counts only where no scene overlaps.
    """
    captions = {MOTION: camera_caption(camera)}
    sidecar = _best_scene(scenes, start_seconds - zero, end_seconds - zero)
    if sidecar is not None:
        captions[SIDECAR] = sidecar
    return captions


def _best_scene(scenes: Sequence[SceneCaption], start: float, end: float) -> str | None:
    """Return the caption with the largest overlap; None without any overlap."""
    best: tuple[float, float, str] | None = None
    for scene in scenes:
        overlap = min(end, scene.end) - max(start, scene.start)
        # Of equal overlaps the shorter scene is more specific.
        candidate = (overlap, -(scene.end - scene.start), scene.text)
        if overlap > 0 and (best is None or candidate[:2] > best[:2]):
            best = candidate
    return best[2] if best else None
