"""Rows of the catalogue's tables from what the decode pass finds; the schema is in svd/catalogue/schema.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from svd.catalogue.axes import axes_computed
from svd.curation.base.types import ClipAnalysis, ClipFile, Cut, DroppedSpan, SourceAnalysis, SourceFacts

WHOLE_SHARE = 0.9  # a source of which less was decoded than this has a warning; headers are a little off


def of_clip(clip: ClipAnalysis, file: ClipFile, analysis: SourceAnalysis) -> dict[str, Any]:
    """Return the columns of a clip that follow from its analysis and its file."""
    span, facts = clip.span, analysis.facts
    camera = asdict(clip.camera)
    return {
        "start_frame": span.start_frame,
        "end_frame": span.end_frame,
        "start_pts": span.start_pts,
        "end_pts": span.end_pts,
        "time_base": str(facts.time_base),
        "start_seconds": span.start_seconds,
        "end_seconds": span.end_seconds,
        "duration": file.duration,
        "frames": file.frames,
        "fps": span.fps,
        "variable_rate": span.variable_rate,
        "width": file.width,
        "height": file.height,
        "codec": file.codec,
        "method": file.method,
        "pixel_format": file.pixel_format,
        "transfer": file.transfer,
        "sample_aspect": str(file.sample_aspect),
        "rotation": file.rotation,
        "interlaced": file.interlaced,
        "shot_start_frame": span.shot_start_frame,
        "shot_end_frame": span.shot_end_frame,
        "start_cut": _boundary(analysis.cuts, span.start_cut),
        "end_cut": _boundary(analysis.cuts, span.end_cut),
        "camera": camera.pop("label"),
        "camera_motion": camera,
        "text_areas": list(clip.text_areas),
        **{axis.column: clip.scores[axis.name] for axis in axes_computed("measured")},
    }


def _boundary(cuts: Sequence[Cut], index: int | None) -> dict[str, Any] | None:
    """Return the evidence of the cut at one end of a clip; None without a cut."""
    if index is None:
        return None
    cut = cuts[index]
    return {name: getattr(cut, name) for name in ("kind", "detector", "score", "threshold", "seconds")}


def of_facts(facts: SourceFacts) -> dict[str, Any]:
    """Return the columns of a source that its analysis adds; the size is that of the shown image."""
    return {
        "container": facts.container,
        "codec": facts.codec,
        "width": facts.display_width,
        "height": facts.display_height,
        "fps": facts.fps,
        "duration": facts.duration,
        "decoded_share": facts.decoded_share,
        "frames": facts.frames,
        "warnings": [*facts.warnings, *_mostly_missing(facts.decoded_share)],
    }


def _mostly_missing(decoded_share: float | None) -> list[str]:
    if decoded_share is None or decoded_share >= WHOLE_SHARE:
        return []
    return [f"only {decoded_share:.0%} of the duration that its header declares was decoded"]


def of_cut(uri: str, cut: Cut) -> dict[str, Any]:
    """Return the row of a cut."""
    names = ("kind", "frame", "start_frame", "end_frame", "seconds", "detector", "score", "threshold")
    return {"source_uri": uri, **{name: getattr(cut, name) for name in names}}


def of_dropped(uri: str, span: DroppedSpan) -> dict[str, Any]:
    """Return the row of a span that is in no clip."""
    names = ("start_frame", "end_frame", "start_seconds", "end_seconds", "reason")
    return {"source_uri": uri, **{name: getattr(span, name) for name in names}}


def to_json(value: Mapping[str, Any]) -> str | None:
    """Return a mapping as JSON with sorted keys; None when it is empty."""
    return json.dumps(value, sort_keys=True, default=str) if value else None
