"""The axes that clips are filtered by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Axis:
    """A score that clips are filtered by; `side` is the end that is kept ("min": high scores, "max": low ones).

    optional: a clip without this score passes: there is no claim about its content that could be wrong (a clip whose
    only caption is the measured camera motion), no earlier clip that it could repeat.
    """

    name: str
    column: str
    side: Literal["min", "max"]
    title: str
    optional: bool = False

    @property
    def option(self) -> str:
        """Name of the option in the preset's section `curation.filters`."""
        return f"{self.side}_{'duplicate_similarity' if self.name == 'duplicate' else self.name}"


AXES = (
    Axis("motion", "motion_score", "min", "optical flow"),
    Axis("aesthetics", "aesthetics", "min", "aesthetic score"),
    Axis("similarity", "similarity", "min", "CLIP similarity", optional=True),
    Axis("text_area", "text_area", "max", "text area"),
    Axis("nsfw", "nsfw", "max", "NSFW score"),
    Axis("duplicate", "duplicate_similarity", "max", "similarity to an earlier clip", optional=True),
)
