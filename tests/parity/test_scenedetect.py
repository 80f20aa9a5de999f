"""Cut scores equal those of PySceneDetect's own detectors on the same frames."""

from __future__ import annotations

import numpy as np
import pytest
from scenedetect import FrameTimecode, StatsManager
from scenedetect.detectors import AdaptiveDetector, ContentDetector, HashDetector

from svd.config import CutPass
from svd.curation.cuts.finder import adaptive_ratios
from svd.curation.cuts.frame_scores import Clock, FrameScorer, to_bgr


def _pictures(count: int = 60) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Y (90, 160), U and V (45, 80): noise that drifts, with cuts at 20 and 41."""
    generator = np.random.default_rng(3)
    pictures = []
    for i in range(count):
        if i in (0, 20, 41):
            base = [generator.integers(20, 230, shape) for shape in ((90, 160), (45, 80), (45, 80))]
        moved = [np.roll(b, i, 1) + generator.integers(-4, 5, b.shape) for b in base]
        luma, blue, red = (np.clip(m, 0, 255).astype(np.uint8) for m in moved)
        pictures.append((luma, blue, red))
    return pictures


def _scorer(passes: list[CutPass], pictures: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> FrameScorer:
    scorer = FrameScorer(passes, 0.4, 24.0)
    for i, picture in enumerate(pictures):
        scorer.add(i, i / 24, picture)
    return scorer


@pytest.mark.parametrize("fps", [None, 8.0, 2.0])
def test_content_scores_equal_the_library(fps: float | None) -> None:
    """At every frame rate of the cascade: the library fed with the frames of that rate."""
    pictures = _pictures()
    scorer = _scorer([CutPass(detector="content", fps=fps, threshold=27)], pictures)
    clock = Clock(fps)
    chosen = [i for i in range(len(pictures)) if clock.tick(i / 24)]
    detector = ContentDetector()
    detector.stats_manager = StatsManager()
    for i in chosen:
        detector.process_frame(FrameTimecode(i, fps=24.0), to_bgr(pictures[i]))
    expected = [detector.stats_manager.get_metrics(FrameTimecode(i, fps=24.0), ["content_val"])[0] for i in chosen[1:]]
    jumps = list(scorer.jumps(fps))
    assert [j.after for j in jumps] == chosen[1:]
    assert [j.score for j in jumps] == pytest.approx(expected, abs=1e-9)


def test_adaptive_ratios_equal_the_library() -> None:
    """The rolling ratio, and so the frames where it proposes a cut."""
    pictures = _pictures()
    scorer = _scorer([CutPass(detector="adaptive", threshold=3)], pictures)
    detector = AdaptiveDetector()
    detector.stats_manager = StatsManager()
    for i, picture in enumerate(pictures):
        detector.process_frame(FrameTimecode(i, fps=24.0), to_bgr(picture))
    key = detector.get_metrics()[-1]
    scores = np.array([0.0] + [j.score for j in scorer.jumps(None)])  # the library gives the first frame a score of 0
    ours = adaptive_ratios(scores)
    for i in range(2, len(pictures) - 2):
        expected = detector.stats_manager.get_metrics(FrameTimecode(i, fps=24.0), [key])[0]
        assert ours[i] == pytest.approx(expected, abs=1e-9)


def test_the_librarys_own_detectors_get_every_frame_of_their_rate() -> None:
    """The hash detector behind the cascade reports what it reports alone."""
    pictures = _pictures()
    scorer = _scorer([CutPass(detector="hash", threshold=0.3)], pictures)
    detector = HashDetector(threshold=0.3, min_scene_len=0.4)
    alone = []
    for i, picture in enumerate(pictures):
        alone += detector.process_frame(FrameTimecode(i, fps=24.0), to_bgr(picture))
    assert [h.frame for h in scorer.library[0].hits] == [c.frame_num for c in alone] == [20, 41]
    assert all(np.isfinite(h.score) for h in scorer.library[0].hits)
