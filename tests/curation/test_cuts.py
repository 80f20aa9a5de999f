"""Cuts are found where they are, and nowhere else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import Kind, scenery, shots, tiny_config, write

from benchmarks.curation.accuracy import Tally, judge
from svd.config import SyntheticWorlds
from svd.core.errors import UserError
from svd.curation.base.types import SourceAnalysis
from svd.curation.cuts.frame_scores import Clock
from svd.curation.cuts.transitions import fit_ramp, unexplained
from svd.curation.measuring.decode_pass import analyse
from svd.synthetic.videos import write_worlds

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
CONTENT = [{"detector": "content", "threshold": 27}]


def _kinds(analysis: SourceAnalysis) -> list[tuple[str, int, int]]:
    return [(c.kind, c.start_frame, c.end_frame) for c in analysis.cuts]


def _mixed(one: list[np.ndarray], other: list[np.ndarray], length: int) -> list[np.ndarray]:
    """One shot dissolving into the other over `length` frames that belong to both."""
    head, tail = one[: len(one) - length], other[length:]
    pairs = zip(one[len(one) - length :], other[:length], strict=True)
    weights = (np.arange(length) + 1) / (length + 1)
    return (
        head + [np.rint(a * (1 - w) + b * w).astype(np.uint8) for (a, b), w in zip(pairs, weights, strict=True)] + tail
    )


def test_hard_cuts_have_their_exact_frames_and_evidence(tmp_path: Path) -> None:
    """Frame, time and the detector's score and threshold."""
    analysis = analyse(write(tmp_path / "hard", list(shots([30, 25, 41]))), tiny_config())
    assert _kinds(analysis) == [("hard", 30, 30), ("hard", 55, 55)]
    for cut in analysis.cuts:
        assert cut.seconds == pytest.approx(cut.frame / 24) and cut.score >= cut.threshold == 27
        assert cut.detector == "content"


@pytest.mark.parametrize("length", [8, 16, 30])
def test_dissolves_are_localised(tmp_path: Path, length: int) -> None:
    """The interval is found to within three frames at each end, or a seventh of its length."""
    one, other = list(shots([60], seed=1)), list(shots([60], seed=2))
    cuts = analyse(write(tmp_path / "mix", _mixed(one, other, length)), tiny_config()).cuts
    assert [c.kind for c in cuts] == ["dissolve"]
    slack = max(3, length // 7)
    assert abs(cuts[0].start_frame - (60 - length)) <= slack and abs(cuts[0].end_frame - 60) <= slack


def test_only_the_slow_passes_see_dissolves(tmp_path: Path) -> None:
    """The cascade is what finds them: a single pass at the source's rate finds nothing (§3.1, Fig. 12)."""
    one, other = list(shots([60], seed=1)), list(shots([60], seed=2))
    source = write(tmp_path / "mix", _mixed(one, other, 20))
    assert analyse(source, tiny_config(cuts__passes=CONTENT)).cuts == []
    assert len(analyse(source, tiny_config()).cuts) == 1


def test_fades_and_black_stretches(tmp_path: Path) -> None:
    """A fade through black is one transition with its interval; black frames belong to no clip."""
    first, second, third = (list(shots([50], seed=s)) for s in (1, 2, 3))
    down = [np.rint(f * (1 - (i + 1) / 12)).astype(np.uint8) for i, f in enumerate(first[38:])]
    up = [np.rint(f * ((i + 1) / 12)).astype(np.uint8) for i, f in enumerate(second[:12])]
    black = [np.zeros_like(first[0])] * 10
    frames = first[:38] + down + black + up + second[12:] + black + third
    analysis = analyse(write(tmp_path / "fades", frames), tiny_config())
    (fade, start, end), gap = _kinds(analysis)
    assert fade == "fade" and abs(start - 38) <= 2 and abs(end - 72) <= 2
    assert gap == ("black", 110, 120)
    assert [c.span.start_frame >= end or c.span.end_frame <= start for c in analysis.clips] == [True] * 3


def test_a_flash_a_strobe_and_motion_are_no_cuts(tmp_path: Path) -> None:
    """White frames between frames of one shot, flicker, a whip pan and a fast object."""
    still = list(shots([48], seed=4))
    flash = still.copy()
    for i in (20, 21):
        flash[i] = np.full_like(flash[i], 250)
    strobe = [
        np.clip(f.astype(int) + (90 if i in (20, 22, 24, 26) else 0), 0, 255).astype(np.uint8)
        for i, f in enumerate(still)
    ]
    pan = list(shots([48], seed=5, speed=5.0))
    crossing = [f.copy() for f in still]
    for i, frame in enumerate(crossing):
        frame[20:70, max(0, 8 * i - 140) : max(0, 8 * i - 90)] = scenery(9, 50, 50)[
            :, : frame.shape[1] - max(0, 8 * i - 140)
        ][:, : max(0, 8 * i - 90) - max(0, 8 * i - 140)][
            :, : frame[20:70, max(0, 8 * i - 140) : max(0, 8 * i - 90)].shape[1]
        ]
    for name, frames in {"flash": flash, "strobe": strobe, "pan": pan, "crossing": crossing}.items():
        assert _kinds(analyse(write(tmp_path / name, frames), tiny_config())) == [], name


@pytest.mark.parametrize("b_frames", [0, 3])
@pytest.mark.parametrize("level", [0, 90])
def test_what_stands_in_for_a_blink_or_flash_within_a_pan_is_no_dissolve(
    tmp_path: Path, b_frames: int, level: int
) -> None:
    """Three frames that are black, or brighter, while the picture moves on."""
    frames = list(shots([96], seed=3, speed=4.0))
    for i in range(48, 51):
        frames[i] = np.clip(frames[i].astype(int) + level, 0, 255).astype(np.uint8) if level else 0 * frames[i]
    kind = Kind(b_frames=b_frames, gop=250, options={"x264-params": "scenecut=0"})
    assert _kinds(analyse(write(tmp_path / "pan", frames, kind=kind), tiny_config())) == []


def test_worlds_reach_the_accuracy_that_is_promised(tmp_path: Path) -> None:
    """Hard cuts F1 ≥ 0.98 at ±2 frames; fades and dissolves ≥ 0.9 by overlap, on rendered worlds with known cuts."""
    write_worlds(tmp_path, SyntheticWorlds(train_videos=4, test_videos=1, scenes_per_video=8, height=96, width=144), 3)
    truth = json.loads((tmp_path / "truth.json").read_text())
    tally = Tally()
    for name, video in truth.items():
        found = [(c.start_frame, c.end_frame, c.kind != "hard") for c in analyse(tmp_path / name, tiny_config()).cuts]
        judge(tally, video["cuts"], found)
    figures = tally.figures()
    assert tally.hard >= 8 and tally.gradual >= 8
    assert figures["hard_f1"] >= 0.98 and figures["gradual_recall"] >= 0.9
    assert figures["precision"] >= 0.9 and figures["gradual_overlap"] >= 0.75


def test_real_footage(tmp_path: Path) -> None:
    """The trailer's cuts, checked by eye: hard cuts, and fades to black; the single shot has none."""
    trailer = analyse(SAMPLES / "big-buck-bunny-trailer.mp4", tiny_config())
    assert [c.frame for c in trailer.cuts if c.kind == "hard"] == [113, 384, 420, 508, 569]
    assert [c.kind for c in trailer.cuts if c.kind != "hard"] == ["fade"]
    assert analyse(SAMPLES / "big-buck-bunny.mp4", tiny_config()).cuts == []
    assert [(c.kind, c.frame) for c in analyse(SAMPLES / "city-night.mpg", tiny_config()).cuts] == [("hard", 20)]


OTHER_DETECTORS = [
    ("adaptive", 3),
    ("hash", 0.35),
    ("histogram", 0.2),
    pytest.param("transnetv2", 0.5, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("detector, threshold", OTHER_DETECTORS)
def test_other_detectors(tmp_path: Path, detector: str, threshold: float) -> None:
    """Each can stand alone in the cascade; the trained TransNetV2 of the wheel too."""
    source = write(tmp_path / "hard", list(shots([60, 50, 70], height=108, width=192)))
    config = tiny_config(cuts__passes=[{"detector": detector, "threshold": threshold}])
    cuts = analyse(source, config).cuts
    assert [c.frame for c in cuts] == [60, 110]
    assert all(c.detector == detector and c.score >= threshold for c in cuts)


@pytest.mark.slow
@pytest.mark.parametrize("others", [[], CONTENT], ids=["alone", "with content"])
def test_transnetv2_sees_every_frame_of_a_calm_clip(tmp_path: Path, others: list[dict]) -> None:
    """Where nothing happens the cascade leaves frames out, but not with this network among its passes."""
    frames = list(shots([120, 60, 70], height=108, width=192, speed=0.0))
    kind = Kind(b_frames=3, gop=250, options={"x264-params": "scenecut=0"})
    passes = [{"detector": "transnetv2", "threshold": 0.5}, *others]
    cuts = analyse(write(tmp_path / "calm", frames, kind=kind), tiny_config(cuts__passes=passes)).cuts
    assert [c.frame for c in cuts] == [120, 180]


def test_transnetv2_has_no_frame_rate_of_its_own() -> None:
    with pytest.raises(UserError, match="'transnetv2' reads every frame of the source: leave 'fps' out"):
        tiny_config(cuts__passes=[{"detector": "transnetv2", "fps": 8, "threshold": 0.5}])


def test_settling_in_stages_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deciding every few seconds, as for long sources, gives the same analysis as deciding once at the end."""
    frames = list(shots([70, 60, 90, 50, 130, 80], seed=6))
    frames = frames[:300] + _mixed(frames[300:380], list(shots([80], seed=7)), 16)
    source = write(tmp_path / "long", frames)
    whole = analyse(source, tiny_config())
    monkeypatch.setattr("svd.curation.measuring.decode_pass.CHUNK_SECONDS", 1.5)
    staged = analyse(source, tiny_config())
    assert staged.cuts == whole.cuts and staged.dropped == whole.dropped
    assert [c.span for c in staged.clips] == [c.span for c in whole.clips]
    assert all(np.array_equal(a.flow, b.flow) for a, b in zip(staged.clips, whole.clips, strict=True))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.sampled_from([23.976, 25.0, 30.0, 59.94]))
def test_the_slower_clock_keeps_time(fps: int, seconds: int, rate: float) -> None:
    """One frame in each interval of the slower rate, never more than the source has."""
    clock = Clock(float(fps))
    times = [i / rate for i in range(int(seconds * rate))]
    chosen = [t for t in times if clock.tick(t)]
    expected = min(fps, rate) * times[-1]
    assert abs(len(chosen) - expected) <= 2 + 0.01 * expected
    assert all(b > a for a, b in itertools.pairwise(chosen))


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 25), st.integers(2, 12), st.integers(0, 1000))
def test_ramps_are_fitted_exactly_without_motion(length: int, pad: int, seed: int) -> None:
    """Still pictures: the interval is exact and nothing lies beside the line."""
    one, other = (scenery(s, 24, 40)[..., 0].reshape(-1).astype(np.float64) for s in (seed, seed + 5000))
    weights = np.concatenate([np.zeros(pad), (np.arange(length) + 1) / (length + 1), np.ones(pad)])
    pictures = np.rint(one + weights[:, None] * (other - one)).astype(np.uint8)
    ramp = fit_ramp(pictures, 24 * 40)
    assert ramp is not None and abs(ramp.start - pad) <= 1 and abs(ramp.end - pad - length) <= 1
    assert ramp.error < 0.03 and ramp.off_line < 0.05


def test_motion_explains_a_pan_but_not_a_dissolve() -> None:
    """The test that tells them apart."""
    wide = scenery(1, 24, 80)[..., 0]
    pan = np.stack([wide[:, i : i + 40] for i in range(12)])
    weights = np.linspace(0, 1, 12)[:, None, None]
    dissolve = np.rint(wide[:, :40] * (1 - weights) + wide[:, 40:] * weights).astype(np.uint8)
    assert unexplained(pan) < 0.4 < 0.7 < unexplained(dissolve)


def test_long_groups_and_b_frames_make_no_difference(tmp_path: Path) -> None:
    """The same frames, coded in another way, have the same cuts."""
    frames = list(shots([50, 40, 45], seed=8))
    kinds = [
        Kind(),
        Kind(b_frames=4, gop=250, options={"x264-params": "scenecut=0"}),
        Kind(suffix="mpg", codec="mpeg2video"),
    ]
    found = [_kinds(analyse(write(tmp_path / f"v{i}", frames, kind=k), tiny_config())) for i, k in enumerate(kinds)]
    assert found[0] == found[1] == found[2] == [("hard", 50, 50), ("hard", 90, 90)]
