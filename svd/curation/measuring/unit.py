"""Measuring a unit: one decode of each of its sources, its clips written, everything that needs no large network.

A unit is a shard of sources. It is worked on in a folder beside the final one and appears by one rename, so it is
either complete or absent; killed at any moment, it is simply done again, and gives the same bytes.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from svd.catalogue import schema
from svd.catalogue import tables as catalog
from svd.config import CurationConfig
from svd.core.errors import UserError
from svd.core.files import atomic_folder
from svd.curation.captions import base as captions
from svd.curation.clips.stills import write_frame
from svd.curation.measuring.fetching import local_file
from svd.curation.measuring.process import Analyst, WorkerError
from svd.curation.types import Analysis, ClipAnalysis, ClipFile, Cut, SourceFailure
from svd.sources.listing import Source, printable

log = logging.getLogger(__name__)
LEAST_FREE = 16 << 20  # bytes; below, a failure is taken for one of the disk


@dataclass(frozen=True)
class Identified:
    """A source whose bytes have been seen, or one part of a long one.

    failure: why they couldn't be; duplicate_of: uri of an equal source; part: its number, and of how many.
    """

    source: Source
    source_id: str
    bytes: int
    failure: str = ""
    duplicate_of: str = ""
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Unit:
    """A shard of sources; `number` is its place in the catalogue."""

    number: int
    sources: tuple[Identified, ...]

    @property
    def name(self) -> str:
        """Name of its folder and of its shard."""
        return f"clips-{self.number:06d}"


def identify(source: Source) -> Identified:
    """Hash a local source; one that must be fetched first is hashed once it is here, in `measure_unit`."""
    if source.remote:
        return Identified(source, "", 0)
    assert source.path is not None
    try:
        if source.offset is not None:
            return Identified(
                source, catalog.content_hash_of(source.path, source.offset, source.size or 0), source.size or 0
            )
        size = source.path.stat().st_size
        if not source.path.is_file():
            return Identified(source, "", 0, failure="not a regular file")
        if size == 0:
            return Identified(source, "", 0, failure="empty file (0 bytes)")
        return Identified(source, catalog.content_hash(source.path), size)
    except OSError as error:
        return Identified(source, "", 0, failure=f"can't be read: {error.strerror or error}")


def measure_unit(unit: Unit, config: CurationConfig, folder: Path, analyst: Analyst) -> Path:
    """Analyse every source of `unit` and write its clips; returns `folder`/<unit name>, complete.

    Inside: sources.parquet, clips.parquet (columns MEASURED), cuts.parquet, dropped.parquet, `clips/<id>.mp4`,
    `frames/<id>-<0|1|2>.jpg`, flow.safetensors. A source that fails has a row with the reason.
    """
    target = folder / unit.name
    if target.exists():
        return target
    with atomic_folder(target) as temporary:
        for name in ("clips", "frames"):
            (temporary / name).mkdir(parents=True)
        work = _UnitWork(unit, config, temporary, analyst)
        for identified in unit.sources:
            work.add(identified)
        work.write()
    return target


class _UnitWork:
    """Rows of a unit while it is measured."""

    def __init__(self, unit: Unit, config: CurationConfig, folder: Path, analyst: Analyst) -> None:
        self.unit, self.config, self.folder = unit, config, folder
        self.sources: list[dict[str, Any]] = []
        self.clips: list[dict[str, Any]] = []
        self.cuts: list[dict[str, Any]] = []
        self.dropped: list[dict[str, Any]] = []
        self.flow: dict[str, np.ndarray] = {}
        self.captions: dict[str, dict[str, str]] = {}
        self.analyst = analyst

    def add(self, identified: Identified) -> None:
        """Analyse one source; whatever is wrong with it, exactly one row of it is added. Raises WorkerError."""
        row = _source_row(identified)
        self.sources.append(row)
        if identified.failure or identified.duplicate_of:
            row["verdict"] = "failed" if identified.failure else "duplicate"
            row["reason"] = identified.failure or f"same bytes as {identified.duplicate_of}"
            row["duplicate_of"] = identified.duplicate_of or None
            return
        try:
            with local_file(identified.source, self.folder / "fetched") as path:
                if not identified.source_id:
                    row["source_id"], row["bytes"] = catalog.content_hash(path), path.stat().st_size
                self._analyse(path, identified, row)
        except WorkerError:
            raise
        except SourceFailure as failure:
            row.update(verdict="failed", reason=failure.reason)
        except UserError as error:
            row.update(verdict="failed", reason=str(error))
        except OSError as error:
            row.update(verdict="failed", reason=f"can't be read: {error.strerror or error}")
        except Exception as error:
            # One hostile file must not end a run over millions; the trace goes to the log, the fact into the row.
            log.error("%s: %s", identified.source.uri, traceback.format_exc())
            row.update(verdict="failed", reason=f"internal error: {type(error).__name__}: {error}")
        if row["verdict"] == "failed":
            self._check_space()

    def _check_space(self) -> None:
        """A full disk is no fault of the source that was at work."""
        if shutil.disk_usage(self.folder).free < LEAST_FREE:
            raise WorkerError(f"{self.folder.parent}: the disk is full; free some space and run the stage again")

    def _analyse(self, path: Path, identified: Identified, row: dict[str, Any]) -> None:
        source = identified.source
        analysis = self.analyst.analyse(
            path,
            self.config,
            lambda clip: self._take(clip, row["source_id"]),
            identified.part,
            self.folder / "part.mp4",
        )
        row.update(_facts(analysis))
        targets = [catalog.clip_id(row["source_id"], clip.span.start_pts, clip.span.end_pts) for clip in analysis.clips]
        files = self.analyst.write_clips(
            path,
            analysis.facts,
            [
                (clip.span, self.folder / "clips" / f"{name}.mp4")
                for name, clip in zip(targets, analysis.clips, strict=True)
            ],
        )
        rows = [
            self._clip(name, clip, file, analysis, source, row)
            for name, clip, file in zip(targets, analysis.clips, files, strict=True)
        ]
        self.clips.extend(rows)
        own = analysis.cuts[analysis.inherited :]
        self.cuts.extend(_cut_row(source.uri, cut) for cut in own)
        self.dropped.extend({"source_uri": source.uri, **_dropped(d)} for d in analysis.dropped)
        row.update(clips=len(rows), cuts=len(own))
        row["verdict"] = "ok" if rows else "no-clips"
        if not rows:
            row["reason"] = "no clip: " + ("; ".join(sorted({d.reason for d in analysis.dropped})) or "no frames")

    def _take(self, clip: ClipAnalysis, source_id: str) -> ClipAnalysis:
        """Write a clip's frames while the source is still being decoded: those of a whole film would not fit into
        memory. Returns the rest.
        """
        name = catalog.clip_id(source_id, clip.span.start_pts, clip.span.end_pts)
        for position, frame in enumerate(clip.frames):
            write_frame(self.folder, name, position, frame)
        return replace(clip, frames=clip.frames[:0].copy())  # a copy: a view would keep the frames

    def _clip(
        self,
        name: str,
        clip: ClipAnalysis,
        file: ClipFile,
        analysis: Analysis,
        source: Source,
        row: Mapping[str, Any],
    ) -> dict[str, Any]:
        areas = list(clip.text_areas)
        self.flow[name] = np.ascontiguousarray(clip.flow, np.float16)
        span, facts = clip.span, analysis.facts
        self.captions[name] = captions.own_captions(
            source.captions,
            clip.camera.label,
            span.start_seconds,
            span.end_seconds,
            float(facts.start_pts * facts.time_base),
        )
        camera = asdict(clip.camera)
        return {
            "clip_id": name,
            "source_id": row["source_id"],
            "source_uri": source.uri,
            "split": source.split,
            "unit": self.unit.number,
            "start_frame": span.start_frame,
            "end_frame": span.end_frame,
            "start_pts": span.start_pts,
            "end_pts": span.end_pts,
            "time_base": str(facts.time_base),
            "start_seconds": span.start_seconds,
            "end_seconds": span.end_seconds,
            "duration": file.duration,
            "frames": file.frames,
            "fps": facts.fps if facts.variable_frame_rate else file.frames / file.duration,
            "width": file.width,
            "height": file.height,
            "codec": file.codec,
            "method": file.method,
            "shot_start_frame": span.shot_start_frame,
            "shot_end_frame": span.shot_end_frame,
            "start_cut": _boundary(analysis.cuts, span.start_cut),
            "end_cut": _boundary(analysis.cuts, span.end_cut),
            "motion_score": clip.motion_score,
            "camera": camera.pop("label"),
            "camera_motion": camera,
            "text_area": float(np.median(areas)),
            "text_areas": areas,
            "licence": source.licence,
            "metadata": _json(source.metadata),
        }

    def write(self) -> None:
        """Write the tables; clips in the order of their sources and times."""
        for row in self.sources:
            row["reason"] = printable(" ".join(row["reason"].split()))
        catalog.write_rows(self.folder / "sources.parquet", self.sources, schema.SOURCES_SCHEMA)
        catalog.write_rows(self.folder / "clips.parquet", self.clips, schema.MEASURED_SCHEMA)
        catalog.write_rows(self.folder / "cuts.parquet", self.cuts, schema.CUTS_SCHEMA)
        catalog.write_rows(self.folder / "dropped.parquet", self.dropped, schema.DROPPED_SCHEMA)
        save_file(self.flow, self.folder / "flow.safetensors")
        (self.folder / "captions.json").write_text(_json(self.captions) or "{}")
        shutil.rmtree(self.folder / "fetched", ignore_errors=True)


def _source_row(identified: Identified) -> dict[str, Any]:
    source = identified.source
    return {
        "source_id": identified.source_id or None,
        "source_uri": source.uri,
        "split": source.split,
        "verdict": "ok",
        "reason": "",
        "duplicate_of": None,
        "bytes": identified.bytes,
        "clips": 0,
        "scenes": sum(c.start > 0 or math.isfinite(c.end) for c in source.captions) or None,
        "licence": source.licence,
        "metadata": _json(source.metadata),
    }


def _facts(analysis: Analysis) -> dict[str, Any]:
    facts = analysis.facts
    return {
        "container": facts.container,
        "codec": facts.codec,
        "width": facts.display_width,
        "height": facts.display_height,
        "fps": facts.fps,
        "duration": facts.duration,
        "frames": facts.frames,
        "warnings": list(facts.warnings),
    }


def _boundary(cuts: Sequence[Cut], index: int | None) -> dict[str, Any] | None:
    if index is None:
        return None
    cut = cuts[index]
    return {
        "kind": cut.kind,
        "detector": cut.detector,
        "score": cut.score,
        "threshold": cut.threshold,
        "seconds": cut.seconds,
    }


def _cut_row(uri: str, cut: Cut) -> dict[str, Any]:
    names = ("kind", "frame", "start_frame", "end_frame", "seconds", "detector", "score", "threshold")
    return {"source_uri": uri, **{name: getattr(cut, name) for name in names}}


def _dropped(span: Any) -> dict[str, Any]:
    names = ("start_frame", "end_frame", "start_seconds", "end_seconds", "reason")
    return {name: getattr(span, name) for name in names}


def _json(value: Mapping[str, Any]) -> str | None:
    return json.dumps(value, sort_keys=True, default=str) if value else None


def units_of(sources: Sequence[Identified], per_unit: int) -> Iterator[Unit]:
    """Split identified sources into units of `per_unit`, in order; a part of a long source is a unit of its own."""
    number, group = 0, list[Identified]()
    for one in sources:
        alone = one.part[1] > 1
        if group and (alone or len(group) == per_unit):
            yield Unit(number, tuple(group))
            number, group = number + 1, []
        group.append(one)
        if alone:
            yield Unit(number, tuple(group))
            number, group = number + 1, []
    if group:
        yield Unit(number, tuple(group))
