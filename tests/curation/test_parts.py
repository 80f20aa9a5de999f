"""Long sources split by time: the same frames, cuts and rows as in one piece."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from curation_inputs import context, tiny, write_encoders, write_sources
from media_files import MATRICES, Kind, decode_rgb, shots, tiny_config, write

from svd.catalogue import schema, tables
from svd.config import CurationConfig
from svd.curation import stage
from svd.curation.base.types import SourceAnalysis
from svd.curation.clips.writer import write_clip
from svd.curation.measuring.decode_pass import analyse
from svd.curation.measuring.parts import analyse_part, count_parts, seconds_claimed
from svd.curation.measuring.process import DecodeProcess
from svd.curation.measuring.unit import identify, measure_unit, units_of
from svd.curation.merge import join_parts
from svd.sources.listing import list_sources

LENGTHS = [100, 57, 130, 113]
KINDS = {
    "b-frames": Kind(b_frames=2, gop=24),
    "transport stream": Kind(suffix="ts", b_frames=2, gop=24),
    "matroska": Kind(suffix="mkv", b_frames=2, gop=24),
    "turned": Kind(rotation=90, gop=24),
    "mirrored": Kind(matrix=MATRICES["transposed"], gop=24),
    "program stream, open groups": Kind(suffix="mpg", codec="mpeg2video", b_frames=2, gop=24),
    "open groups": Kind(b_frames=3, gop=24, options={"x264-params": "open-gop=1"}),
}


def listed(found: SourceAnalysis) -> list[tuple]:
    """The cuts that a source or part lists, without their scores."""
    return [(c.kind, c.start_frame, c.frame, c.pts, round(c.start_seconds, 6)) for c in found.cuts[found.inherited :]]


def split(source: Path, config: CurationConfig, scratch: Path) -> list[SourceAnalysis]:
    """The analyses of all parts of a source."""
    count = count_parts(source, config)
    return [analyse_part(source, config, lambda clip: clip, (n, count), scratch) for n in range(count)]


@pytest.mark.parametrize("shift", [-30, -2, -1, 0, 1, 2, 30])
def test_a_cut_near_a_boundary_is_listed_once(tmp_path: Path, shift: int) -> None:
    """On it, a frame beside it, or farther away; the clips on both sides know the cut, as those of the whole do."""
    frames = list(shots([120 + shift, 120 - shift]))
    kind = Kind(b_frames=2, gop=24, options={"x264-params": "scenecut=0"})
    source, config = write(tmp_path / "source", frames, kind=kind), tiny_config(part_seconds=5.0)
    whole, parts = analyse(source, config), split(source, config, tmp_path / "part.mp4")
    assert [part.facts.frames for part in parts] == [120, 120]
    assert [(c.kind, c.frame) for c in whole.cuts] == [("hard", 120 + shift)]
    assert [cut for part in parts for cut in listed(part)] == listed(whole)
    assert [len(listed(part)) for part in parts] == ([1, 0] if shift <= 0 else [0, 1])
    spans = [(clip.span, part.cuts) for part in parts for clip in part.clips]
    ends = [cuts[span.end_cut].frame for span, cuts in spans if span.end_cut is not None]
    starts = [cuts[span.start_cut].frame for span, cuts in spans if span.start_cut is not None]
    # One or two frames between boundary and cut are no clip; the one before them ends at the boundary.
    assert starts == [120 + shift] and ends == ([] if shift in (1, 2) else [120 + shift])


@pytest.mark.parametrize("shift", [-12, -6, 0])
def test_a_dissolve_over_a_boundary_belongs_to_no_clip(tmp_path: Path, shift: int) -> None:
    """It is listed once, with its whole interval, and both parts leave its frames out."""
    one, other, length = list(shots([132 + shift], seed=1)), list(shots([240], seed=2)), 12
    start = 120 + shift
    weights = (np.arange(length) + 1) / (length + 1)
    mixed = [
        np.rint(a * (1 - w) + b * w).astype(np.uint8)
        for a, b, w in zip(one[start:], other[start:], weights, strict=False)
    ]
    frames = one[:start] + mixed + other[start + length :]
    kind = Kind(gop=24, options={"x264-params": "scenecut=0"})
    source, config = write(tmp_path / "source", frames, kind=kind), tiny_config(part_seconds=5.0)
    whole, parts = analyse(source, config), split(source, config, tmp_path / "part.mp4")
    assert [c.kind for c in whole.cuts] == ["dissolve"]
    assert [cut for part in parts for cut in listed(part)] == listed(whole)
    cut = whole.cuts[0]
    spans = [clip.span for part in parts for clip in part.clips]
    assert spans and all(s.end_frame <= cut.start_frame or s.start_frame >= cut.end_frame for s in spans)


@pytest.mark.parametrize(("shift", "length"), [(1, 10), (2, 17), (1, 40)])
def test_a_fade_that_starts_at_a_boundary_is_listed_once(tmp_path: Path, shift: int, length: int) -> None:
    """Its start is estimated from the frames that were looked at, and the parts look at different ones."""
    start = 125 + shift
    one, other = list(shots([start + length], seed=1, speed=0.3)), list(shots([250], seed=2, speed=0.3))
    weights = (np.arange(length) + 1) / (length + 1)
    mixed = [
        np.rint(a * max(0, 1 - 2 * w) + b * max(0, 2 * w - 1)).astype(np.uint8)
        for a, b, w in zip(one[start:], other[start:], weights, strict=False)
    ]
    frames = one[:start] + mixed + other[start + length :]
    kind = Kind(gop=25, options={"x264-params": "scenecut=0"})
    source, config = write(tmp_path / "source", frames, fps=25, kind=kind), tiny_config(part_seconds=5.0)
    parts = split(source, config, tmp_path / "part.mp4")
    ((found, first, end, *_),) = [cut for part in parts for cut in listed(part)]
    assert found == "fade" and abs(first - start) <= 2 and abs(end - start - length) <= 2
    spans = [clip.span for part in parts for clip in part.clips]
    assert spans and all(s.end_frame <= first or s.start_frame >= end for s in spans)


@pytest.mark.parametrize("name", KINDS)
def test_parts_hold_the_frames_of_the_source(tmp_path, name):
    source = write(tmp_path / "source", list(shots(LENGTHS)), kind=KINDS[name])
    config = tiny_config(part_seconds=4.0)
    count = count_parts(source, config)
    whole, truth = analyse(source, config), decode_rgb(source)
    assert count == 4
    position, cuts = 0, []
    for number in range(count):
        seen = []
        part = analyse_part(
            source, config, lambda clip, seen=seen: seen.append(clip) or clip, (number, count), tmp_path / "part.mp4"
        )
        assert seen == part.clips and part.facts.orientation == whole.facts.orientation
        assert part.facts.start_pts == whole.facts.start_pts and part.facts.time_base == whole.facts.time_base
        cuts += listed(part)
        spans = sorted((s.start_frame, s.end_frame) for s in [*(c.span for c in part.clips), *part.dropped])
        for start, end in spans:
            assert start == position
            position = end
        for clip in part.clips:
            span = clip.span
            assert span.start_pts * whole.facts.time_base == pytest.approx(span.start_seconds)
            write_clip(source, span, part.facts, tmp_path / "clip.mp4")
            frames, expected = decode_rgb(tmp_path / "clip.mp4"), truth[span.start_frame : span.end_frame]
            assert len(frames) == len(expected) == span.frames
            limit = 0 if span.method == "copy" else 3
            assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(frames, expected, strict=True)) <= limit
    assert position == len(truth) and not (tmp_path / "part.mp4").exists()
    assert cuts == listed(whole)


def test_what_cannot_be_split_stays_whole(tmp_path):
    frames = list(shots(LENGTHS))
    config = tiny_config(part_seconds=4.0)
    one_keyframe = Kind(gop=1000, options={"x264-params": "scenecut=0:keyint=infinite"})
    for kind in (
        one_keyframe,
        Kind(suffix="avi", codec="mpeg4"),
        Kind(suffix="mov", codec="mjpeg", pixel_format="yuvj420p"),
    ):
        assert count_parts(write(tmp_path / "source", frames, kind=kind), config) == 1
    assert count_parts(write(tmp_path / "source", frames), tiny_config(part_seconds=60.0)) == 1


@pytest.mark.slow
def test_a_split_source_has_one_row_and_its_clips_those_of_the_whole(tmp_path):
    sources, encoders = write_sources(tmp_path / "sources", train=2, scenes=6), write_encoders(tmp_path / "encoders")
    found = {}
    for name, seconds in (("whole", 3600), ("split", 4)):
        preset = tiny(curation__part_seconds=seconds)
        run = context(preset, sources, encoders, tmp_path / name)
        stage.run(run)
        found[name] = run.output
    whole, split = (tables.read_sources(found[name]) for name in ("whole", "split"))
    same = ("source_uri", "source_id", "verdict", "frames", "width", "bytes", "licence")
    assert split.select(same).equals(whole.select(same))
    assert split["duration"].to_list() == pytest.approx(whole["duration"].to_list())
    clips, parts = (tables.read_clips(found[name]) for name in ("whole", "split"))
    assert parts["unit"].n_unique() > 4 and split["clips"].sum() == len(parts)
    assert parts.select("source_uri", "start_frame").equals(parts.select("source_uri", "start_frame").sort(pl.all()))
    both = clips.join(parts, on="clip_id", suffix="_of_part")
    assert len(both) > len(clips) / 3
    for column in ("start_seconds", "frames", "method", "captions", "camera"):
        assert both[column].to_list() == both[f"{column}_of_part"].to_list()


def test_long_members_of_tars_are_split_as_files_are(tmp_path):
    source = write(tmp_path / "source", list(shots(LENGTHS)), kind=Kind(gop=24))
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "w.tar", "w") as tar:
        tar.add(source, "film.mp4")
    config = tiny_config(part_seconds=4.0)
    found = [identify(one) for one in list_sources([str(tmp_path / "in"), str(source)])]
    parts = stage.split_long(found, config, tmp_path / "fetched")
    assert [one.part for one in parts] == 2 * [(number, 4) for number in range(4)]
    frames = []
    with DecodeProcess() as decoding:
        for unit in units_of(parts[:4], 5):
            folder = measure_unit(unit, config, tmp_path / "measured", decoding)
            rows = pl.read_parquet(folder / "sources.parquet")
            frames += rows["frames"].to_list()
            assert rows["source_uri"].to_list() == [f"{tmp_path}/in/w.tar#film.mp4"]
    assert sum(frames) == sum(LENGTHS) and len(frames) == 4
    assert not list((tmp_path / "fetched").iterdir())


def test_a_header_promises_no_more_seconds_than_the_bytes_can_hold(tmp_path):
    frames = list(shots([48]))
    honest = write(tmp_path / "honest", frames)
    assert seconds_claimed(honest) == pytest.approx(2.0, abs=0.1)
    boastful = write(tmp_path / "boastful", frames, kind=Kind(suffix="mkv", pts=[*range(47), 10**5]))
    assert seconds_claimed(boastful) == boastful.stat().st_size / 4000


def test_a_part_that_fails_is_told():
    columns = schema.SOURCES_SCHEMA
    rows = [
        {
            "source_uri": "a",
            "verdict": "ok",
            "reason": "",
            "frames": 50,
            "duration": 2.0,
            "clips": 1,
            "warnings": ["odd"],
        }
    ]
    rows += [{"source_uri": "a", "verdict": "failed", "reason": "crashed", "clips": 0}]
    rows += [{"source_uri": "b", "verdict": "ok", "reason": "", "frames": 5, "duration": 1.0, "clips": 1}]
    frame = pl.from_arrow(tables.with_schema(pl.DataFrame(rows), columns))
    first, second = join_parts(frame).to_dicts()
    assert (first["verdict"], first["frames"], first["clips"], first["fps"]) == ("ok", 50, 1, 25.0)
    assert first["warnings"] == ["odd", "a part: crashed"] and second["warnings"] == []
