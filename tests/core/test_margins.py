"""Standard errors of differences: what counts as independent."""

from __future__ import annotations

import numpy as np
import pytest

from svd.core.margins import margin


def test_samples_of_one_clip_are_one_sample() -> None:
    draw = np.random.default_rng(0)
    clips = draw.normal(size=10)
    repeated = (clips[:, None] + 1e-3 * draw.normal(size=(10, 8))).ravel().tolist()
    names = [f"clip-{k}" for k in range(10) for _ in range(8)]
    alone, clustered = margin(clips.tolist()), margin(repeated, clusters=names)
    assert alone is not None and clustered == pytest.approx(alone, rel=0.1)
    assert abs(margin(repeated) or 0) > 2 * abs(alone), "taken as independent they say more than they know"
    assert margin(repeated, clusters=["one"] * 80) is None
    own = [str(k) for k in range(80)]
    assert margin(repeated, clusters=own) == pytest.approx(margin(repeated))
