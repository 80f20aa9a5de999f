"""Scores of the axes that are measured from a decoded clip: one function per axis.

They run in the decoding process, while the clip's frames are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from svd.curation.base.types import ClipAnalysis
from svd.curation.measuring import picture_scores


def _text_area(clip: ClipAnalysis) -> float:
    """Return the median of the three frames: the share of the frame that text covers in at least two of them."""
    return float(np.median(clip.text_areas))


# By axis name (svd.catalogue.axes). None: the axis can't be measured on this clip.
MEASURES: Mapping[str, Callable[[ClipAnalysis], float | None]] = {
    "motion": lambda clip: clip.motion_score,
    "text_area": _text_area,
    "sharpness": lambda clip: picture_scores.sharpness(clip.frames),
    "luma": lambda clip: picture_scores.mean_luma(clip.frames),
    "clipped": lambda clip: picture_scores.clipped(clip.frames),
    "bars": lambda clip: picture_scores.bars(clip.frames),
}


def axis_scores(clip: ClipAnalysis) -> dict[str, float | None]:
    """Compute the measured scores of a clip by axis name; its frames and text areas must be there."""
    return {name: measure(clip) for name, measure in MEASURES.items()}
