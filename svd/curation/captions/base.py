"""Captions of clips: one protocol for every captioner, and the two captioners that need no network (§3.1, App. C).

The paper's three are CoCa on the middle frame (.5), VideoBLIP on the clip (.25) and an LLM that merges both (.25); here
they are in svd/curation/captions/registry.py. `sidecar` takes the caption that came with the source,
`motion` states the measured camera motion. Every caption is kept in the row; training draws one by the preset's
probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from svd.core.errors import UserError

if TYPE_CHECKING:  # what reads lists of sources has no business in the process that captions
    from svd.curation.base.types import CameraLabel
    from svd.sources.listing import SceneCaption

# Captions that say what is to be seen; a sentence about the camera alone says nothing to CLIP.
MOTION = "motion"
SIDECAR = "sidecar"


@dataclass(frozen=True)
class CaptionRequest:
    """A clip to describe. frames: first, middle, last, (3, H, W, 3) uint8 RGB; video: its mp4; captions: known ones."""

    clip_id: str
    frames: np.ndarray
    video: Path
    captions: Mapping[str, str]


class Captioner(Protocol):
    """Describes clips; `name` is the captioner's name in the preset and in the catalogue."""

    name: str

    def describe(self, requests: Sequence[CaptionRequest]) -> list[str | None]:
        """One caption a request, None where there is nothing to say."""


def own_captions(
    scenes: Sequence[SceneCaption], camera: CameraLabel, start_seconds: float, end_seconds: float, zero: float
) -> dict[str, str]:
    """Captions known without a network for the clip [start, end) of a source whose clock starts at `zero` seconds.

    `sidecar`: of the scene that overlaps the clip most (a caption of the whole source only where no scene has one);
    `motion`: from the camera label.
    """
    from svd.curation.motion.camera import camera_caption

    captions = {MOTION: camera_caption(camera)}
    sidecar = _best_scene(scenes, start_seconds - zero, end_seconds - zero)
    if sidecar is not None:
        captions[SIDECAR] = sidecar
    return captions


def _best_scene(scenes: Sequence[SceneCaption], start: float, end: float) -> str | None:
    best: tuple[float, float, str] | None = None
    for scene in scenes:
        overlap = min(end, scene.end) - max(start, scene.start)
        # Of equal overlaps the shorter scene is the more specific one.
        candidate = (overlap, -(scene.end - scene.start), scene.text)
        if overlap > 0 and (best is None or candidate[:2] > best[:2]):
            best = candidate
    return best[2] if best else None


def describe_all(
    requests: Sequence[CaptionRequest], known: Sequence[Mapping[str, str]], captioners: Sequence[Captioner]
) -> list[dict[str, str]]:
    """Captions by captioner of every clip: those `known` for it, then each of `captioners` in order.

    A later captioner sees the captions of the earlier ones (the LLM merges them).
    """
    captions = [dict(own) for own in known]
    for captioner in captioners:
        asked = [CaptionRequest(r.clip_id, r.frames, r.video, own) for r, own in zip(requests, captions, strict=True)]
        for own, text in zip(captions, captioner.describe(asked), strict=True):
            if text and text.strip():
                own[captioner.name] = " ".join(text.split())
    return captions


VIDEO = "video"


MISSING = "needs transformers: pip install 'svd-platform[captions]'"


def import_transformers(option: str) -> Any:
    """The module transformers; raises UserError that names the option which needs it."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise UserError(f"{option} {MISSING}") from None
    return transformers


def first_line(error: Exception) -> str:
    """The first line of a message, at most 300 characters."""
    return str(error).strip().split("\n")[0][:300]
