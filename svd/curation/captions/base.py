"""The interface of captioners (§3.1, App. C).

The paper uses three captioners: CoCa on the middle frame (probability .5), VideoBLIP on the clip (.25), and an LLM that
merges both (.25). Every caption is stored in the row of the clip; training draws one by the preset's probabilities.

A captioner `<name>` is the module svd/curation/captions/<name>.py with a function
`make_<name>(config: CaptionsConfig, device: str) -> Captioner`; `registry` finds it by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from svd.core.errors import UserError

# Captions that need no network (see `known`). `motion` says nothing about content, so CLIP can't rate it.
Caption = tuple[str, str]  # the captioner and its text
MOTION = "motion"
SIDECAR = "sidecar"


@dataclass(frozen=True)
class CaptionRequest:
    """A clip to describe.

    frames: first, middle and last frame, (3, H, W, 3) uint8 RGB. video: its mp4. captions: those known so far, by
    name; of several by one captioner the first.
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
    requests: Sequence[CaptionRequest], known: Sequence[Sequence[Caption]], captioners: Sequence[Captioner]
) -> list[list[Caption]]:
    """Return the captions of every clip: those `known` for it, then those of `captioners` in order.

    A captioner sees the captions of the earlier ones: the LLM merges them.
    """
    captions = [list(own) for own in known]
    for captioner in captioners:
        asked = [replace(one, captions=_first_of_each(own)) for one, own in zip(requests, captions, strict=True)]
        for own, text in zip(captions, captioner.describe(asked), strict=True):
            if text and text.strip():
                own.append((captioner.name, " ".join(text.split())))
    return captions


def _first_of_each(captions: Sequence[Caption]) -> dict[str, str]:
    found: dict[str, str] = {}
    for captioner, text in captions:
        found.setdefault(captioner, text)
    return found


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
