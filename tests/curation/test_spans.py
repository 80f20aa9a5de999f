"""Where clips begin and end: no frame is lost or taken twice, at any distance of keyframes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import Kind, decode_rgb, shots, tiny_config, write

from svd.config import ClipsConfig
from svd.curation.clips.spans import ShotSpan, SpanPlanner, Timeline
from svd.curation.clips.writer import write_clips
from svd.curation.decoding.probe import PacketIndex
from svd.curation.measuring.decode_pass import analyse

TICK = Fraction(1, 100)


def timeline(steps: list[int], keyframes: set[int], reordered: int) -> Timeline:
    """Frames shown for `steps` hundredths of a second; each run of `reordered` ones is decoded after the next frame."""
    pts = np.cumsum([0, *steps[:-1]])
    order: list[int] = []
    waiting: list[int] = []
    for frame in range(len(steps)):
        if frame and len(waiting) < reordered and frame not in keyframes and frame < len(steps) - 1:
            waiting.append(frame)
        else:
            order += [frame, *waiting]
            waiting = []
    keys = np.array([frame in keyframes for frame in order])
    plain = np.zeros(len(order), np.int64)
    index = PacketIndex(pts[order], plain, plain, keys, keys & False, steps[-1], TICK, True, ())
    return Timeline(pts, int(sum(steps)), index, TICK)


@st.composite
def films(draw: st.DrawFn) -> tuple[Timeline, ShotSpan, float, float]:
    """A film of constant or variable rate, a shot in it, and the shortest and longest clip in seconds."""
    count = draw(st.integers(1, 120))
    steps = draw(
        st.one_of(
            st.integers(1, 25).map(lambda s: [s] * count), st.lists(st.integers(1, 25), min_size=count, max_size=count)
        )
    )
    keyframes = draw(
        st.one_of(
            st.integers(1, 130).map(lambda d: set(range(0, count, d))), st.sets(st.integers(0, count - 1), max_size=8)
        )
    )
    start = draw(st.integers(0, count - 1))
    shot = ShotSpan(start, draw(st.integers(start + 1, count)), 0, 1)
    shortest = draw(st.integers(50, 200)) / 100
    # A frame lasts at most a quarter second: two of them always fit between the shortest and the longest clip.
    return (
        timeline(steps, keyframes, draw(st.integers(0, 3))),
        shot,
        shortest,
        shortest + draw(st.integers(25, 900)) / 100,
    )


@given(films(), st.sampled_from(["packet", "keyframe"]), st.sampled_from(["reencode", "drop"]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_frame_is_in_one_clip_or_dropped_for_a_true_reason(film, end, policy, copyable) -> None:
    times, shot, shortest, longest = film
    config = ClipsConfig(min_seconds=shortest, max_seconds=longest, no_keyframe=policy, end=end)
    clips, dropped = SpanPlanner(times, config, copyable).plan(shot)
    position = shot.start
    for span in sorted([*clips, *dropped], key=lambda span: span.start_frame):
        assert span.start_frame == position < span.end_frame
        position = span.end_frame
    assert position == shot.end
    for clip in clips:
        assert clip.frames >= 2
        assert shortest - 1e-6 <= clip.end_seconds - clip.start_seconds <= longest + 1e-6
        assert clip.method == "reencode" or (copyable and clip.start_frame in times.keyframes)
        assert clip.method == "copy" or policy == "reencode"
    assert [clip.start_cut for clip in clips] == [0, *[None] * (len(clips) - 1)][: len(clips)]
    assert [clip.end_cut for clip in clips] == [*[None] * (len(clips) - 1), 1][-len(clips) :] or not clips
    for span in dropped:
        seconds = span.end_seconds - span.start_seconds
        if policy == "reencode":
            assert seconds < shortest and span.reason == f"shorter than {shortest:g} s"
        keys = times.keyframes[(times.keyframes > span.start_frame) & (times.keyframes < span.end_frame)]
        assert span.reason != "after the last complete packet" or len(keys)
        assert span.reason != "before the next keyframe" or span.end_frame in times.keyframes


def test_frames_that_are_shown_for_longer_than_a_clip_say_so() -> None:
    config = ClipsConfig(min_seconds=1, max_seconds=2)
    clips, dropped = SpanPlanner(timeline([300, 300, 10], {0}, 0), config).plan(ShotSpan(0, 3, None, None))
    assert not clips and [span.reason for span in dropped] == ["no two frames within 2 s"]


def test_a_copied_clip_leaves_enough_for_the_next_one() -> None:
    """Keyframes every 20.3 s: 20 s copied would leave 0.3 s behind, 19 s copied leave a clip to re-encode."""
    film = timeline([10] * 406, {0, 203}, 0)
    config = ClipsConfig(min_seconds=1, max_seconds=20)
    clips, dropped = SpanPlanner(film, config).plan(ShotSpan(0, 406, None, None))
    assert not dropped
    assert [(c.end_frame, c.method) for c in clips] == [
        (193, "copy"),
        (203, "reencode"),
        (396, "copy"),
        (406, "reencode"),
    ]
    strict, lost = SpanPlanner(film, config.model_copy(update={"no_keyframe": "drop"})).plan(
        ShotSpan(0, 406, None, None)
    )
    assert [c.end_frame for c in strict] == [200, 403] and len(lost) == 2


@pytest.mark.parametrize(
    ("distance", "copied", "encoded"),
    [(10, 6, 0), (25, 5, 4), (47, 3, 5), (1000, 1, 5)],
)
def test_no_footage_is_lost_at_any_distance_of_keyframes(
    tmp_path: Path, distance: int, copied: int, encoded: int
) -> None:
    """Twelve seconds in clips of at most two: copied from keyframes on, re-encoded between, each frame once."""
    kind = Kind(gop=distance, options={"x264-params": f"scenecut=0:keyint={distance}:min-keyint={distance}"})
    source = write(tmp_path / "source", list(shots([120], speed=0.5)), fps=10, kind=kind)
    config = tiny_config(
        clips__max_seconds=2, clips__min_seconds=0.5, cuts__passes=[{"detector": "content", "threshold": 250}]
    )
    analysis = analyse(source, config)
    spans = [clip.span for clip in analysis.clips]
    assert not analysis.dropped and [s.start_frame for s in spans] == [0, *(s.end_frame for s in spans[:-1])]
    assert [sum(s.method == m for s in spans) for m in ("copy", "reencode")] == [copied, encoded]
    targets = [tmp_path / f"{number}.mp4" for number in range(len(spans))]
    write_clips(source, analysis.facts, list(zip(spans, targets, strict=True)))
    frames = [frame for target in targets for frame in decode_rgb(target)]
    assert len(frames) == 120
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(frames, decode_rgb(source), strict=True)) < 3
