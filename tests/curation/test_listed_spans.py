"""Clips that a list names: they end where it says, and have its captions; whatever the codec, whole or in parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import Kind, decode_rgb, shots, tiny_config, write

from svd.config import CurationConfig
from svd.curation.base.types import ClipAnalysis, ClipFile, Seconds, SourceAnalysis
from svd.curation.clips.listed import pieces
from svd.curation.clips.spans import ShotSpan, Timeline
from svd.curation.clips.writer import write_clip, write_clips
from svd.curation.decoding.probe import PacketIndex
from svd.curation.measuring.axis_scores import axis_scores
from svd.curation.measuring.parts import analyse_part, count_parts
from svd.curation.measuring.process import DecodeProcess
from svd.curation.measuring.unit import Identified, Unit, measure_unit
from svd.sources.source import SceneCaption, Source, Span


class Here:
    """Decodes in this process: a child process costs seconds."""

    write_clips = staticmethod(write_clips)

    def analyse(
        self,
        path: Path,
        config: CurationConfig,
        taken: Callable[[ClipAnalysis], ClipAnalysis],
        part: tuple[int, int],
        scratch: Path,
        spans: Sequence[Seconds],
    ) -> SourceAnalysis:
        def scored(clip: ClipAnalysis) -> ClipAnalysis:
            clip = replace(clip, text_areas=(0.0, 0.0, 0.0))
            return taken(replace(clip, scores=axis_scores(clip)))

        return analyse_part(path, config, scored, part, scratch, spans)


def measured(folder: Path, *sources: Source) -> Path:
    """The unit of these sources, whose bytes are hashed when they are there, as those of remote sources are."""
    unit = Unit(0, tuple(Identified(source, "", 0) for source in sources))
    return measure_unit(unit, tiny_config(), folder / "measured", cast(DecodeProcess, Here()))


def sidecars(unit: Path) -> dict[str, list[str]]:
    """The captions of each clip that came with its source."""
    known = json.loads((unit / "captions.json").read_text())
    return {clip: [text for name, text in captions if name == "sidecar"] for clip, captions in known.items()}


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 s with cuts at 2 and 4 s."""
    return write(tmp_path_factory.mktemp("film") / "film", list(shots([48, 48, 24])), kind=Kind(gop=12))


def test_every_span_has_its_clips_and_its_captions_or_a_reason(film: Path, tmp_path: Path) -> None:
    spans = (
        Span(0.5, 1.5, ("one", "also one"), "CC0", {"score": 1}),
        Span(1.5, 3.5, ("two",), None, {"score": 2}),
        Span(4.0, 4.4, ("short",)),
        Span(9.0, 10.0, ("behind",)),
    )
    unit = measured(tmp_path, Source("a", film, spans=spans, licence="MIT", metadata={"of": "all"}))
    clips, texts = pl.read_parquet(unit / "clips.parquet"), sidecars(unit)
    found = []
    for row in clips.iter_rows(named=True):
        of = 0 if row["end_frame"] <= 36 else 1
        assert 24 * spans[of].start <= row["start_frame"] < row["end_frame"] <= 24 * spans[of].end
        assert texts[row["clip_id"]] == list(spans[of].captions)
        assert json.loads(row["metadata"]) == {"of": "all", "score": of + 1}
        assert row["licence"] == ("CC0", "MIT")[of]
        found.append((row["start_frame"], row["end_frame"]))
    assert found == [(12, 36), (36, 48), (48, 84)] or found == [(12, 36), (48, 84)], "the cut at 48 counts too"
    dropped = pl.read_parquet(unit / "dropped.parquet")
    accounted = sorted(found + list(dropped.select("start_frame", "end_frame").iter_rows()))
    assert [start for start, _ in accounted] == [0, *(end for _, end in accounted[:-1])] and accounted[-1][1] == 120
    reasons = {row["start_frame"]: row["reason"] for row in dropped.iter_rows(named=True)}
    assert reasons[0] == reasons[84] == "outside the spans of its list" and "shorter" in reasons[96]
    (row,) = pl.read_parquet(unit / "sources.parquet").to_dicts()
    assert (row["verdict"], row["scenes"]) == ("ok", 4)
    assert row["warnings"] == ["1 spans of its list begin after its end, such as 9 s"]


def test_equal_bytes_in_one_unit_keep_their_captions_apart(film: Path, tmp_path: Path) -> None:
    one, other = (Source(name, film, captions=(SceneCaption(name),)) for name in "ab")
    skipped = Source("c.gif", film, skipped="a .gif file")
    unit = measured(tmp_path, one, other, skipped)
    rows = pl.read_parquet(unit / "sources.parquet").select("verdict", "duplicate_of", "reason", "clips").rows()
    count = len(sidecars(unit))
    assert count and all(texts == ["a"] for texts in sidecars(unit).values())
    assert rows == [
        ("ok", None, "", count),
        ("duplicate", "a", "same bytes as a", 0),
        ("skipped", None, "a .gif file", 0),
    ]


@pytest.mark.parametrize(
    ("codec", "name", "kind"),
    [
        ("av1", "av1", Kind("mp4", "libsvtav1", gop=24, options={"preset": "12"})),
        ("vp9", "vp9", Kind("webm", "libvpx-vp9", gop=24, options={"deadline": "realtime", "cpu-used": "8"})),
    ],
)
def test_codecs_are_called_by_their_own_names_copied_and_split(
    tmp_path: Path, codec: str, name: str, kind: Kind
) -> None:
    source = write(tmp_path / "source", list(shots([72, 72], speed=2)), kind=kind)
    config, spans = tiny_config(part_seconds=3.0, clips__min_seconds=0.5), [(0.0, 2.0), (2.0, 4.5)]
    count = count_parts(source, config)
    assert count == 2
    for number in range(count):
        found = analyse_part(source, config, lambda clip: clip, (number, count), tmp_path / "part.mp4", spans)
        assert found.facts.codec == name and found.clips
        for clip in found.clips:
            start, end = spans[clip.span.listed or 0]
            assert 24 * start <= clip.span.start_frame < clip.span.end_frame <= 24 * end
            file: ClipFile = write_clip(source, clip.span, found.facts, tmp_path / f"{clip.span.start_frame}.mp4")
            assert (file.method, file.codec, file.frames) == ("copy", name, clip.span.frames)
            assert len(decode_rgb(tmp_path / f"{clip.span.start_frame}.mp4")) == file.frames


def timeline(rate: Fraction, frames: int) -> Timeline:
    """Frames at a constant rate, with times as they are stored: in whole milliseconds."""
    pts = np.array([round(1000 * n / rate) for n in range(frames)])
    nothing = np.zeros(frames, bool)
    index = PacketIndex(pts, pts, np.ones(frames, np.int64), nothing, nothing, 1, Fraction(1, 1000), True, ())
    return Timeline(pts, round(1000 * frames / rate), index, Fraction(1, 1000))


ends = st.tuples(st.integers(0, 110), st.integers(1, 40))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([Fraction(24), Fraction(30000, 1001)]), st.lists(ends, min_size=1, max_size=5), ends)
def test_no_piece_of_a_shot_crosses_the_end_of_a_span(
    rate: Fraction, listed: list[tuple[int, int]], shot: tuple[int, int]
) -> None:
    times = timeline(rate, 100)
    frames = [(start, start + length) for start, length in listed]
    spans: Any = [tuple(round(float(end / rate), 3) for end in one) for one in frames]
    start, stop = min(shot[0], 98), min(min(shot[0], 98) + shot[1], 100)
    inside, outside = pieces(ShotSpan(start, stop, 3, 4), times, spans)
    together = sorted((one.start, one.end) for one in inside + outside)
    assert [a for a, _ in together] == [start, *(b for _, b in together[:-1])] and together[-1][1] == stop
    for piece in inside + outside:
        holding = {i for i, (first, last) in enumerate(frames) if first <= piece.start and piece.end <= last}
        touching = {i for i, (first, last) in enumerate(frames) if first < piece.end and piece.start < last}
        assert holding == touching
        assert piece.listed is None if piece in outside else piece.listed in holding
        assert bool(holding) == (piece in inside)
        lengths = [last - first for first, last in spans]
        assert piece.listed is None or lengths[piece.listed] == min(lengths[i] for i in holding)
