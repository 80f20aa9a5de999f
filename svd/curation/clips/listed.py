"""Clips that a list names: its spans cut shots, and what lies outside of them becomes no clip."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from svd.curation.base.types import Seconds
from svd.curation.clips.spans import ShotSpan, Timeline

RESOLUTION = 0.001  # seconds: times in lists have milliseconds, so a frame may begin this much after its stated time


def pieces(shot: ShotSpan, timeline: Timeline, spans: Sequence[Seconds]) -> tuple[list[ShotSpan], list[ShotSpan]]:
    """Cut a shot at the ends of all spans; return the pieces inside of one, with its index, and those outside.

    spans: seconds [start, end) from the first frame; none: the whole shot is inside. Where spans overlap, a piece is of
    the shortest one.
    """
    if not spans:
        return [shot], []
    frames = [(_frame(start, timeline), _frame(end, timeline)) for start, end in spans]
    inner = {frame for ends in frames for frame in ends if shot.start < frame < shot.end}
    inside: list[ShotSpan] = []
    outside: list[ShotSpan] = []
    for start, end in itertools.pairwise(sorted({shot.start, *inner, shot.end})):
        holding = [i for i, (first, last) in enumerate(frames) if first <= start and end <= last]
        piece = replace(
            shot,
            start=start,
            end=end,
            start_cut=shot.start_cut if start == shot.start else None,
            end_cut=shot.end_cut if end == shot.end else None,
            listed=min(holding, key=lambda i: (spans[i][1] - spans[i][0], i), default=None),
        )
        (inside if holding else outside).append(piece)
    return inside, outside


def _frame(seconds: float, timeline: Timeline) -> int:
    """Return the first frame that begins at a time or after it."""
    ticks = (seconds - RESOLUTION) / timeline.time_base
    return int(np.searchsorted(timeline.pts, timeline.pts[0] + ticks))
