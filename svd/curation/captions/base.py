"""The interface of captioners (§3.1, App. C).

The paper uses three captioners: CoCa on the middle frame (probability .5), VideoBLIP on the clip (.25), and an LLM that
merges both (.25). Every caption is stored in the row of the clip; training draws one by the preset's probabilities.

A captioner `<name>` is the module svd/curation/captions/<name>.py with a function
`make_<name>(config: CaptionsConfig, device: str) -> Captioner`; `registry` finds it by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from svd.core.errors import UserError

# Captions that need no network (see `known`). `motion` says nothing about content, so CLIP can't rate it.
MOTION = "motion"
SIDECAR = "sidecar"


@dataclass(frozen=True)
class CaptionRequest:
    """A clip to describe.

    frames: first, middle and last frame, (3, H, W, 3) uint8 RGB. video: its mp4. captions: those known so far, by name.
    """

    clip_id: str
    frames: np.ndarray
    video: Path
    captions: Mapping[str, str]


class Captioner(Protocol):
    """Describes clips; `name` is its name in the preset and in the catalogue."""

    name: str

    def describe(self, requests: Sequence[CaptionRequest]) -> list[str | None]:
        """Return one caption per request; None where there is nothing to say."""


def describe_all(
    requests: Sequence[CaptionRequest], known: Sequence[Mapping[str, str]], captioners: Sequence[Captioner]
) -> list[dict[str, str]]:
    """Return the captions of every clip by name: those `known` for it, then those of `captioners` in order.

    A captioner sees the captions of the earlier ones: the LLM merges them.
    """
    captions = [dict(own) for own in known]
    for captioner in captioners:
        asked = [CaptionRequest(r.clip_id, r.frames, r.video, own) for r, own in zip(requests, captions, strict=True)]
        for own, text in zip(captions, captioner.describe(asked), strict=True):
            if text and text.strip():
                own[captioner.name] = " ".join(text.split())
    return captions


def import_transformers(option: str) -> Any:
    """Import transformers, an optional dependency; raises UserError that names the option which needs it."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise UserError(f"{option} needs transformers: pip install 'svd-platform[captions]'") from None
    return transformers


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 300 characters."""
    return str(error).strip().split("\n")[0][:300]
