"""Measuring a unit of sources: each source is decoded once, and everything is computed that needs no large network.

A unit is a shard of sources. It is built in a temporary folder and appears by one rename, so it is complete or absent.
A killed unit is done again and gives the same bytes.
"""

from __future__ import annotations

import itertools
import logging
import math
import shutil
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from svd.catalogue import schema, tables
from svd.config import CurationConfig
from svd.core.addresses import public_text
from svd.core.errors import UserError
from svd.core.files import atomic_folder
from svd.curation.base.types import ClipAnalysis, ClipFile, SourceAnalysis, SourceFacts, SourceFailure
from svd.curation.captions.base import Caption
from svd.curation.captions.known import known_captions
from svd.curation.clips.stills import write_still
from svd.curation.measuring import rows
from svd.curation.measuring.child import without_frames
from svd.curation.measuring.fetching import local_file
from svd.curation.measuring.process import DecodeProcess, WorkerError
from svd.sources.source import Source, Span, printable

log = logging.getLogger(__name__)
LEAST_FREE = 16 << 20  # bytes; with less free space a failure is blamed on the disk, not on the source


@dataclass(frozen=True)
class Identified:
    """A source, or one part of a long source, with the identity of its bytes.

    failure: why the bytes can't be read; empty if they can. duplicate_of: uri of an equal source; empty if none.
    part: number of the part, number of parts.
    """

    source: Source
    source_id: str
    bytes: int
    failure: str = ""
    duplicate_of: str = ""
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Unit:
    """A shard of sources; `number` is its position in the catalogue."""

    number: int
    sources: tuple[Identified, ...]

    @property
    def name(self) -> str:
        """Return the name of its folder and of its shard."""
        return f"clips-{self.number:06d}"


def identify(source: Source) -> Identified:
    """Hash a local source; a remote one is hashed in `measure_unit`, once it is fetched."""
    if source.remote or source.skipped:
        return Identified(source, "", 0)
    assert source.path is not None
    try:
        if source.offset is not None:
            return Identified(
                source, tables.content_hash_of(source.path, source.offset, source.size or 0), source.size or 0
            )
        size = source.path.stat().st_size
        if not source.path.is_file():
            return Identified(source, "", 0, failure="not a regular file")
        if size == 0:
            return Identified(source, "", 0, failure="empty file (0 bytes)")
        return Identified(source, tables.content_hash(source.path), size)
    except OSError as error:
        return Identified(source, "", 0, failure=f"can't be read: {error.strerror or error}")


def new_source(identified: Identified) -> dict[str, Any]:
    """Return the row of a source before it is analysed."""
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
        "scenes": len(source.spans) + sum(c.start > 0 or math.isfinite(c.end) for c in source.captions) or None,
        "licence": source.licence,
        "metadata": rows.to_json(source.metadata),
    }


def measure_unit(unit: Unit, config: CurationConfig, folder: Path, decoding: DecodeProcess) -> Path:
    """Analyse every source of `unit` and write its clips; return the complete folder `folder`/<unit name>.

    It holds sources.parquet, clips.parquet (columns MEASURED), cuts.parquet, dropped.parquet, captions.json,
    flow.safetensors, `clips/<id>.mp4` and `frames/<id>-<0|1|2>.jpg`. A source that fails has a row with the reason.
    Raises WorkerError when no decoding process can be had or the disk is full.
    """
    target = folder / unit.name
    if target.exists():
        return target
    with atomic_folder(target) as temporary:
        for name in ("clips", "frames"):
            (temporary / name).mkdir(parents=True)
        work = _UnitWork(unit, config, temporary, decoding)
        for identified in unit.sources:
            work.add(identified)
        work.write()
    return target


class _UnitWork:
    """The rows of a unit while it is measured."""

    def __init__(self, unit: Unit, config: CurationConfig, folder: Path, decoding: DecodeProcess) -> None:
        self.unit, self.config, self.folder = unit, config, folder
        self.sources: list[dict[str, Any]] = []
        self.clips: list[dict[str, Any]] = []
        self.cuts: list[dict[str, Any]] = []
        self.dropped: list[dict[str, Any]] = []
        self.flow: dict[str, np.ndarray] = {}
        self.captions: dict[str, list[Caption]] = {}
        self.first: dict[str, str] = {}  # uri of the first source of this unit with some bytes
        self.decoding = decoding

    def add(self, identified: Identified) -> None:
        """Analyse one source; exactly one row is added, whatever is wrong with the source. Raises WorkerError."""
        row = new_source(identified)
        self.sources.append(row)
        if identified.source.skipped or identified.failure:
            row["verdict"] = "failed" if identified.failure else "skipped"
            row["reason"] = identified.failure or identified.source.skipped
            return
        if identified.duplicate_of:
            _mark_duplicate(row, identified.duplicate_of)
            return
        try:
            with local_file(identified.source, self.folder / "fetched") as path:
                if not identified.source_id:
                    row["source_id"], row["bytes"] = tables.content_hash(path), path.stat().st_size
                # Equal bytes have clips of equal ids: within a unit the second would get the captions of the first.
                if first := self.first.get(row["source_id"]):
                    _mark_duplicate(row, first)
                    return
                self._analyse(path, identified, row)
                self.first[row["source_id"]] = identified.source.uri
        except WorkerError:
            raise
        except SourceFailure as failure:
            row.update(verdict="failed", reason=failure.reason)
        except UserError as error:
            row.update(verdict="failed", reason=str(error))
        except OSError as error:
            row.update(verdict="failed", reason=f"can't be read: {error.strerror or error}")
        except Exception as error:
            # One hostile file must not end a run over millions. The traceback goes to the log, the reason into the row.
            log.error("%s: %s", identified.source.uri, public_text(traceback.format_exc()))
            row.update(verdict="failed", reason=f"internal error: {type(error).__name__}: {error}")
        if row["verdict"] == "failed":
            self._check_space()

    def _check_space(self) -> None:
        """Raise WorkerError when the disk is full: the source that was at work is not to blame."""
        if shutil.disk_usage(self.folder).free < LEAST_FREE:
            raise WorkerError(f"{self.folder.parent}: the disk is full; free some space and run the stage again")

    def _analyse(self, path: Path, identified: Identified, row: dict[str, Any]) -> None:
        """Analyse a source that is on disk, write its clips and complete its `row`."""
        source = identified.source
        analysis = self.decoding.analyse(
            path,
            self.config,
            lambda clip: self._take(clip, row["source_id"]),
            identified.part,
            self.folder / "part.mp4",
            [(span.start, span.end) for span in source.spans],
        )
        row.update(rows.of_facts(analysis.facts))
        row["warnings"] += _unheld(source, analysis.facts)
        targets = [tables.clip_id(row["source_id"], clip.span.start_pts, clip.span.end_pts) for clip in analysis.clips]
        files = self.decoding.write_clips(
            path,
            analysis.facts,
            [
                (clip.span, self.folder / "clips" / f"{name}.mp4")
                for name, clip in zip(targets, analysis.clips, strict=True)
            ],
        )
        clips = [
            self._clip(name, clip, file, analysis, source, row["source_id"])
            for name, clip, file in zip(targets, analysis.clips, files, strict=True)
        ]
        self.clips.extend(clips)
        own = analysis.cuts[analysis.inherited :]
        self.cuts.extend(rows.of_cut(source.uri, cut) for cut in own)
        self.dropped.extend(rows.of_dropped(source.uri, span) for span in analysis.dropped)
        row.update(clips=len(clips), cuts=len(own))
        row["verdict"] = "ok" if clips else "no-clips"
        if not clips:
            row["reason"] = "no clip: " + ("; ".join(sorted({d.reason for d in analysis.dropped})) or "no frames")

    def _take(self, clip: ClipAnalysis, source_id: str) -> ClipAnalysis:
        """Write the frames of a clip and return the rest.

        This happens while the source is being decoded: the frames of a whole film would not fit into memory.
        """
        name = tables.clip_id(source_id, clip.span.start_pts, clip.span.end_pts)
        for position, frame in enumerate(clip.frames):
            write_still(self.folder, name, position, frame)
        return without_frames(clip)

    def _clip(
        self, name: str, clip: ClipAnalysis, file: ClipFile, analysis: SourceAnalysis, source: Source, source_id: str
    ) -> dict[str, Any]:
        """Return the catalogue row of a clip; keep its flow and its captions for the files of the unit."""
        self.flow[name] = np.ascontiguousarray(clip.flow, np.float16)
        span, facts = clip.span, analysis.facts
        zero = float(facts.start_pts * facts.time_base)
        self.captions[name] = known_captions(source, span, clip.camera.label, zero)
        listed = source.spans[span.listed] if span.listed is not None else Span(0, math.inf)
        own = {"clip_id": name, "unit": self.unit.number, **rows.of_clip(clip, file, analysis)}
        return own | {
            "source_id": source_id,
            "source_uri": source.uri,
            "split": source.split,
            "licence": listed.licence or source.licence,
            "metadata": rows.to_json({**source.metadata, **listed.metadata}),
        }

    def write(self) -> None:
        """Write all tables; clips are in the order of their sources and times."""
        for row in self.sources:
            row["reason"] = printable(public_text(" ".join(row["reason"].split())))
        tables.write_table_rows(self.folder / "sources.parquet", self.sources, schema.SOURCES_SCHEMA)
        tables.write_table_rows(self.folder / "clips.parquet", self.clips, schema.MEASURED_SCHEMA)
        tables.write_table_rows(self.folder / "cuts.parquet", self.cuts, schema.CUTS_SCHEMA)
        tables.write_table_rows(self.folder / "dropped.parquet", self.dropped, schema.DROPPED_SCHEMA)
        save_file(self.flow, self.folder / "flow.safetensors")
        (self.folder / "captions.json").write_text(rows.to_json(self.captions) or "{}")
        shutil.rmtree(self.folder / "fetched", ignore_errors=True)


def _mark_duplicate(row: dict[str, Any], first: str) -> None:
    row.update(verdict="duplicate", reason=f"same bytes as {first}", duplicate_of=first)


def _unheld(source: Source, facts: SourceFacts) -> list[str]:
    """Say which spans of a list can't have a clip of their own."""
    seconds = float((facts.end_pts - facts.start_pts) * facts.time_base)
    behind = [span for span in source.spans if span.start >= seconds]
    crossing = [one for one, other in itertools.pairwise(source.spans) if one.end > other.start]
    said = [f"{len(behind)} spans of its list begin after its end, such as {behind[0].start:g} s" if behind else ""]
    said += [f"{len(crossing)} spans of its list reach into others; a clip is of the shortest" if crossing else ""]
    return [text for text in said if text]


def units_of(sources: Sequence[Identified], per_unit: int) -> Iterator[Unit]:
    """Group sources into units of `per_unit`, in order; each part of a long source is a unit of its own."""
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
