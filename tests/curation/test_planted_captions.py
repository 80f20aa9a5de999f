"""Wrong captions are dropped by a CLIP that has really been trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from curation_inputs import context, tiny, write_sources

from svd.curation import stage
from svd.stage import NoTracker, StageContext
from svd.training import encoders


@pytest.mark.slow
def test_a_trained_toy_clip_drops_planted_wrong_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clips whose caption is another scene's fail the similarity filter, those with their own mostly pass.

    A tenth of the shots has a wrong caption, and the filter drops the worst quarter.
    """
    monkeypatch.setattr(encoders, "_TRAIN_CLIPS", 512)
    monkeypatch.setattr(encoders, "_TEST_CLIPS", 60)
    preset = tiny(encoders__toy_iterations=150, curation__filters__min_similarity={"quantile": 0.25})
    (tmp_path / "encoders").mkdir()
    encoders.run(StageContext(preset, {}, tmp_path / "clip", tmp_path / "encoders", NoTracker()))
    sources = write_sources(tmp_path / "sources", train=7, test=1, scenes=10)
    metrics = stage.run(context(preset, sources, tmp_path / "clip", tmp_path / "run")).metrics
    dropped, clean = metrics["truth_wrong_caption_dropped"], metrics["truth_wrong_caption_clean_dropped"]
    assert dropped >= 0.7 and clean <= 0.3 and dropped > 3 * clean
