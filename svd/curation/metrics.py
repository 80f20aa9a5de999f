"""Metrics of curation: counts and shares; where the truth about sources is known, how much of it was found.

Synthetic sources come with `truth.json` (svd/synthetic/videos.py): their cuts, captions and planted defects.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from svd.catalogue import tables
from svd.curation.merge import Merged

NEAR_DUPLICATE = 0.98  # cosine of mean embeddings, for the report only
TOLERANCE = 2  # frames, for hard cuts
SET_ASIDE = {
    **{"failed": "unusable", "skipped": "not taken"},
    **{"duplicate": "duplicates", "no-clips": "without clips"},
}  # verdicts of sources without clips, in the words of the summary
DEFECTS = ("static", "text", "wrong_caption", "blur")
JUDGED = ("source_uri", "start_frame", "end_frame", "text_area", "camera")  # columns compared with the truth
TEXT_RULE = 0.005  # a clip shows text when text covers more than this share of its frames


def curation_metrics(merged: Merged, sources_folder: Path) -> dict[str, float | int]:
    """Compute the flat metrics of a curation run; `truth_*` only where `sources_folder` holds the truth."""
    clips, sources = merged.clips, merged.sources
    kept = int(clips["keep"].sum())
    values: dict[str, float | int] = {
        "sources": len(sources),
        "sources_failed": int((sources["verdict"] == "failed").sum()),
        "sources_skipped": int((sources["verdict"] == "skipped").sum()),
        "sources_duplicate": int((sources["verdict"] == "duplicate").sum()),
        "sources_without_clips": int((sources["verdict"] == "no-clips").sum()),
        "clips": len(clips),
        "clips_kept": kept,
        "kept_share": round(kept / len(clips), 4) if len(clips) else 0.0,
        "clip_hours": round(float(clips["duration"].sum()) / 3600, 6),
        "clips_stream_copied": int((clips["method"] == "copy").sum()),
        "cuts": pl.scan_parquet(_cuts(merged)).select(pl.len()).collect().item(),
        "near_duplicates": int((clips["duplicate_similarity"].fill_null(0) >= NEAR_DUPLICATE).sum()),
    }
    for verdict, count in clips.group_by(pl.col("verdict").cast(pl.String)).len().sort("verdict").rows():
        values[f"verdict_{verdict}"] = int(count)
    for axis, threshold in merged.thresholds.items():
        values[f"threshold_{axis}"] = round(float(threshold), 6)
    truth = read_truth(sources_folder)
    if truth:
        values |= truth_metrics(truth, merged)
    return values


def curation_summary(merged: Merged) -> str:
    """Summarise a curation run in one line for people."""
    counts = dict(merged.sources.group_by("verdict").len().rows())
    extra = [f"{counts[name]} {text}" for name, text in SET_ASIDE.items() if counts.get(name)]
    kept = int(merged.clips["keep"].sum())
    note = f" ({', '.join(extra)}: see catalogue/sources.parquet)" if extra else ""
    return f"{len(merged.sources)} sources{note}, {len(merged.clips)} clips, {kept} kept"


def read_truth(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the truth by source uri from `truth.json` of the sources' folder; empty without that file."""
    path = folder / "truth.json"
    truth: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    return truth


def truth_metrics(truth: Mapping[str, Mapping[str, Any]], merged: Merged) -> dict[str, float]:
    """Compute precision and recall of cuts, of gradual transitions by overlap, and how planted defects were judged."""
    usable = set(merged.sources.filter(pl.col("verdict") == "ok")["source_uri"])
    known = {uri: video for uri, video in truth.items() if uri in usable}
    cuts = pl.scan_parquet(_cuts(merged)).filter(pl.col("source_uri").is_in(list(known)))
    values = _cut_metrics(known, cuts.collect())
    values |= _defect_metrics(known, merged)
    return {f"truth_{name}": round(value, 4) for name, value in values.items()}


def _cuts(merged: Merged) -> Path:
    return merged.folder / "catalogue" / "cuts.parquet"


def _cut_metrics(truth: Mapping[str, Mapping[str, Any]], cuts: pl.DataFrame) -> dict[str, float]:
    """Compare hard cuts by frame, within TOLERANCE, and gradual transitions by overlap."""
    found: dict[str, list[dict[str, Any]]] = {uri: [] for uri in truth}
    for row in cuts.iter_rows(named=True):
        if row["source_uri"] in found:
            found[row["source_uri"]].append(row)
    hard = matched = false = gradual = overlapped = extra = 0
    for uri, video in truth.items():
        transitions = video["cuts"]
        soft = [(t["start_frame"], t["end_frame"]) for t in transitions if t["kind"] != "hard"]
        places = [t["start_frame"] for t in transitions if t["kind"] == "hard"]
        hits = match_cuts([c["frame"] for c in found[uri] if c["kind"] == "hard"], places, TOLERANCE)
        hard, matched = hard + len(places), matched + len(hits)
        used = set(hits)
        for index, cut in enumerate(c for c in found[uri] if c["kind"] == "hard"):
            near = any(_touches(cut["frame"], cut["frame"] + 1, *span) for span in soft)
            false += index not in used and not near
        spans = [(c["start_frame"], max(c["end_frame"], c["start_frame"] + 1)) for c in found[uri]]
        gradual += len(soft)
        overlapped += sum(any(_touches(*span, *one) for one in spans) for span in soft)
        extra += sum(
            c["kind"] != "hard"
            and not any(_touches(*span, *one) for one in soft)
            and not any(_touches(*span, p - TOLERANCE, p + TOLERANCE) for p in places)
            for c, span in zip(found[uri], spans, strict=True)
        )
    return {
        "hard_cut_recall": matched / max(hard, 1),
        "hard_cut_precision": matched / max(matched + false, 1),
        "gradual_recall": overlapped / max(gradual, 1),
        "gradual_precision": overlapped / max(overlapped + extra, 1),
    }


def match_cuts(found: Sequence[int], places: Iterable[int], tolerance: int) -> list[int]:
    """Match `found` to `places` within `tolerance` frames, each once, nearest first; return indices into `found`."""
    pairs = sorted(
        (abs(frame - place), index, place)
        for index, frame in enumerate(found)
        for place in places
        if abs(frame - place) <= tolerance
    )
    used, taken = [], set()
    for _, index, place in pairs:
        if index not in used and place not in taken:
            used.append(index)
            taken.add(place)
    return used


def _touches(start: int, end: int, other_start: int, other_end: int) -> bool:
    return start < other_end and other_start < end


def scenes_of(
    truth: Mapping[str, Mapping[str, Any]], clips: pl.DataFrame
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pair every clip with the true scene that holds at least nine tenths of its frames."""
    pairs = []
    for row in clips.iter_rows(named=True):
        for scene in truth.get(row["source_uri"], {}).get("scenes", ()):
            inside = min(row["end_frame"], scene["end_frame"]) - max(row["start_frame"], scene["start_frame"])
            if inside >= 0.9 * (row["end_frame"] - row["start_frame"]):
                pairs.append((row, scene))
    return pairs


def _defect_metrics(truth: Mapping[str, Mapping[str, Any]], merged: Merged) -> dict[str, float]:
    """Compute which share of planted defects and of clean clips the filters drop, and how text and camera are found."""
    clips = (
        tables.scan_clips(merged.folder).filter(pl.col("source_uri").is_in(list(truth))).select(*JUDGED, "^pass_.*$")
    )
    known = clips.collect()
    pairs = scenes_of(truth, known)
    values: dict[str, float] = {"clips_in_one_scene": len(pairs) / max(1, len(known))}
    for defect, axis in (("static", "motion"), ("wrong_caption", "similarity"), ("text", "text_area")):
        planted = [row for row, scene in pairs if scene[defect]]
        clean = [row for row, scene in pairs if not any(scene[name] for name in DEFECTS)]
        if planted and axis in merged.thresholds:
            values[f"{defect}_dropped"] = sum(not row[f"pass_{axis}"] for row in planted) / len(planted)
            values[f"{defect}_clean_dropped"] = sum(not row[f"pass_{axis}"] for row in clean) / max(1, len(clean))
    text = [row["text_area"] > TEXT_RULE for row, scene in pairs if scene["text"]]
    clear = [row["text_area"] > TEXT_RULE for row, scene in pairs if not scene["text"]]
    if text:
        values["text_found"] = sum(text) / len(text)
        values["text_false_alarms"] = sum(clear) / max(1, len(clear))
    camera = [row["camera"] == scene["camera"] for row, scene in pairs]
    values["camera_accuracy"] = sum(camera) / max(1, len(camera))
    return values
