"""Captions that need no network (§3.1): `sidecar` came with the source, `motion` states the measured camera motion.

They are computed while a source is measured, so they are known before any captioner runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from svd.curation.base.types import CameraLabel, ClipSpan
from svd.curation.captions.base import MOTION, SIDECAR, Caption
from svd.curation.motion.camera import camera_caption
from svd.sources.source import SceneCaption, Source


def known_captions(source: Source, span: ClipSpan, camera: CameraLabel, zero: float) -> list[Caption]:
    """Return the captions of a clip of `source`, whose clock starts at `zero` seconds.

    `motion` follows from the camera label. `sidecar` are the captions of the span of a list that holds the clip, or
    else of the scene that overlaps it most; captions of the whole source count only where no scene overlaps.
    """
    own = source.spans[span.listed].captions if span.listed is not None else ()
    texts = own or _best_scene(source.captions, span.start_seconds - zero, span.end_seconds - zero)
    return [(MOTION, camera_caption(camera)), *((SIDECAR, text) for text in texts)]


def _best_scene(scenes: Sequence[SceneCaption], start: float, end: float) -> list[str]:
    """Return the captions of the scene with the largest overlap; none without any overlap."""

    def fit(scene: SceneCaption) -> tuple[float, float]:
        # Of equal overlaps the shorter scene is more specific.
        return min(end, scene.end) - max(start, scene.start), -(scene.end - scene.start)

    best = max(scenes, key=fit, default=None)
    if best is None or fit(best)[0] <= 0:
        return []
    return [scene.text for scene in scenes if (scene.start, scene.end) == (best.start, best.end)]
