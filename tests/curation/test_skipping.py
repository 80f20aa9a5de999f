"""Frames that are left out change nothing; planted cuts are found on awkward material, at awkward rates."""

from __future__ import annotations

import itertools
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import Kind, shots, tiny_config, write

from svd.curation.base.types import SourceAnalysis
from svd.curation.decoding import decoder as decode
from svd.curation.decoding.probe import PacketIndex
from svd.curation.decoding.skipping import DecodedTwice, Numbering, skippable
from svd.curation.measuring import decode_pass as analysis
from svd.curation.measuring.decode_pass import analyse

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
LONG_GROUPS = Kind(b_frames=3, gop=250, options={"x264-params": "scenecut=0"})
KINDS = {
    "h264, cuts within groups": LONG_GROUPS,
    "h264, open groups": Kind(b_frames=2, gop=50, options={"x264-params": "b-pyramid=none:open-gop=1"}),
    "mpeg2": Kind(suffix="mpg", codec="mpeg2video", b_frames=2, options={"b": "3000000"}),
    "mpeg4": Kind(codec="mpeg4", b_frames=2, options={"b": "3000000"}),
    "hevc": Kind(codec="libx265", b_frames=3, options={"x265-params": "log-level=none"}),
}
RATES = {"15": Fraction(15), "23.976": Fraction(24000, 1001), "29.97": Fraction(30000, 1001), "60": Fraction(60)}


def world(seed: int, fps: float) -> tuple[list[np.ndarray], list[int]]:
    """Six shots with hard cuts, still or panned at up to 0.75 widths a second, a white flash in the second and a black
    gap in the fourth; and the first frames of the shots after the first. At low rates pans are slower: no eye could
    follow.
    """
    generator = np.random.default_rng(seed)
    lengths = generator.integers(round(0.7 * fps), round(2.2 * fps), 6).tolist()
    speeds = generator.choice([0, 24, 48, 96 if fps > 20 else 36], 6) / fps
    pairs = enumerate(zip(lengths, speeds, strict=True))
    frames = [f for i, (n, speed) in pairs for f in shots([n], seed=100 * seed + i, speed=float(speed))]
    starts = [int(s) for s in np.cumsum(lengths)[:-1]]
    flash, gap = starts[0] + lengths[1] // 2, starts[2] + lengths[3] // 2
    frames[flash] = np.full_like(frames[flash], 250)
    for i in range(max(1, int(fps / 15))):
        frames[gap + i] = np.zeros_like(frames[gap])
    return frames, starts


def cuts(result: SourceAnalysis) -> list[tuple[str, int, int]]:
    return [(c.kind, c.start_frame, c.end_frame) for c in result.cuts]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Timestamps of the frames that are decoded, second looks included."""
    times: list[int | None] = []

    class Counted(decode.DecodedFrame):
        def __init__(self, frame: av.VideoFrame, count: int, size: tuple[int, int] | None) -> None:
            super().__init__(frame, count, size)
            times.append(self.pts)

    monkeypatch.setattr(decode, "DecodedFrame", Counted)
    return times


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_frames_left_out_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int | None], kind: Kind
) -> None:
    """Cuts, clips, motion and sampled frames are those of a full decode."""
    frames, starts = world(3, 25)
    source = write(tmp_path / "world", frames, 25, kind)
    part = analyse(source, tiny_config())
    assert len(set(decoded)) < 0.9 * len(frames)
    monkeypatch.setattr(analysis, "SKIPPING_CODECS", ())
    whole = analyse(source, tiny_config())
    assert part.facts == whole.facts and cuts(part) == cuts(whole) == [("hard", s, s) for s in starts]
    assert [c.span for c in part.clips] == [c.span for c in whole.clips] and part.dropped == whole.dropped
    for one, other in zip(part.clips, whole.clips, strict=True):
        assert one.motion_score == other.motion_score and np.array_equal(one.flow, other.flow)
        assert np.array_equal(one.frames, other.frames) and one.frame_seconds == other.frame_seconds


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("fps", RATES.values(), ids=RATES.keys())
def test_planted_cuts_are_found_exactly(tmp_path: Path, fps: Fraction, seed: int) -> None:
    """Hard cuts on their frames and nothing else: no flash, no black gap within a shot, no fast pan."""
    frames, starts = world(seed, float(fps))
    source = write(tmp_path / "world", frames, fps, LONG_GROUPS if seed else Kind())
    assert cuts(analyse(source, tiny_config())) == [("hard", s, s) for s in starts]


@pytest.mark.parametrize("seed", [5, 6])
def test_planted_cuts_in_variable_frame_rates(tmp_path: Path, seed: int) -> None:
    """Frames of a 60 fps clock last one to six ticks."""
    frames, starts = world(seed, 25)
    pts = np.cumsum(np.random.default_rng(seed).integers(1, 7, len(frames))).tolist()
    result = analyse(write(tmp_path / "world", frames, 60, Kind(b_frames=3, pts=pts)), tiny_config())
    assert result.facts.variable_frame_rate and cuts(result) == [("hard", s, s) for s in starts]
    assert [c.pts for c in result.cuts] == [
        result.facts.start_pts + round((pts[s] - pts[0]) / 60 / result.facts.time_base) for s in starts
    ]


def test_planted_cuts_in_interlaced_video(tmp_path: Path) -> None:
    """Fields that show two moments, coded as MPEG-2 with B-frames."""
    frames, starts = world(4, 50)
    woven = [one.copy() for one in frames[::2]]
    for i, (frame, later) in enumerate(zip(woven, frames[1::2], strict=False)):
        if 2 * i + 1 not in starts:
            frame[1::2] = later[1::2]
    options = {"b": "4000000", "flags": "+ildct+ilme"}
    kind = Kind(suffix="mpg", codec="mpeg2video", b_frames=2, options=options)
    found = cuts(analyse(write(tmp_path / "fields", woven, 25, kind), tiny_config()))
    assert found == [("hard", (s + 1) // 2, (s + 1) // 2) for s in starts]


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_counted_as_they_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Where packets are broken or missing, nothing is left out."""
    frames, _ = world(3, 25)
    source = write(tmp_path / "world", frames, 25, LONG_GROUPS)
    data, generator = bytearray(source.read_bytes()), np.random.default_rng(seed)
    for place in generator.integers(len(data) // 4, len(data) * 9 // 10, 40):
        data[place] ^= 1 << int(generator.integers(8))
    source.write_bytes(data)
    part = analyse(source, tiny_config()).facts
    monkeypatch.setattr(analysis, "SKIPPING_CODECS", ())
    assert part == analyse(source, tiny_config()).facts


def test_second_looks_are_bounded(tmp_path: Path, decoded: list[int | None]) -> None:
    """Where cuts hide everywhere, leaving frames out ends: at most a quarter is decoded twice, after a start."""
    frames = list(shots([9] * 40, seed=11))
    source = write(tmp_path / "busy", frames, 25, LONG_GROUPS)
    starts = list(range(9, 360, 9))
    config = tiny_config(cuts__passes=[{"detector": "content", "threshold": 20}])
    found = [c.frame for c in analyse(source, config).cuts if c.kind == "hard"]
    assert len(set(found) & set(starts)) >= 0.9 * len(starts)
    assert len(decoded) <= 1.25 * len(frames) + 60


def _index(pts: list[int]) -> PacketIndex:
    """Packets in decoding order, the first a keyframe, 25 a second."""
    count = len(pts)
    keys = np.arange(count) == 0
    order = np.arange(count)
    none = np.zeros(count, bool)
    return PacketIndex(np.array(pts), order, order, keys, none, 1, Fraction(1, 25), True, ())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.integers(1, 5), st.data())
def test_enough_frames_remain(groups: list[int], gap: int, data: st.DataObject) -> None:
    """References and sampled frames are never left out, and no more than `gap - 1` frames in a row."""
    pts, anchors = [0], [0]
    for count in groups:
        anchors.append(anchors[-1] + count + 1)
        pts += [anchors[-1], *range(anchors[-2] + 1, anchors[-1])]
    sampled = data.draw(st.sets(st.sampled_from(pts)))
    left_out = set(skippable(_index(pts), gap, sorted(sampled)).tolist())
    assert not left_out & (set(anchors) | sampled)
    kept = sorted(set(pts) - left_out)
    assert max((b - a for a, b in itertools.pairwise(kept)), default=1) <= max(gap, 1)
    numbering = Numbering(np.array(sorted(left_out)))
    assert [numbering.add(t) for t in kept] == kept and numbering.pts == sorted(pts)


def test_debt_counts_every_frame_once() -> None:
    """Steps in one group share a decode; a debt beyond the limit is reported."""
    debt = DecodedTwice(np.array([0, 1000]))
    assert not debt.grows_too_large(40) and not debt.grows_too_large(60)
    assert debt.grows_too_large(100) is (100 > 60 + 25)
    assert not DecodedTwice(np.array([0, 1000])).grows_too_large(1010)


def test_one_pass_costs_little_more_than_decoding() -> None:
    """CPU time beside decoding alone, in turns: 1.4 at this small size, 0.9 to 1.05 at 720p and 1080p
    (benchmarks/curation/speed.py).
    """
    source, config = SAMPLES / "big-buck-bunny-trailer.mp4", tiny_config()

    def decode_alone() -> None:
        with av.open(str(source)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for _ in container.decode(video=0):
                pass

    spent = [0.0, 0.0]
    for _ in range(2):
        for i, work in enumerate((decode_alone, lambda: analyse(source, config))):
            began = time.process_time()
            work()
            spent[i] += time.process_time() - began
    assert spent[1] < 2.2 * spent[0]
