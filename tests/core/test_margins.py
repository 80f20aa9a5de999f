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


@pytest.mark.parametrize("clips", [4, 8, 12, 13, 16, 32])
def test_chance_is_not_shown_however_clips_and_noise_levels_meet(clips: int) -> None:
    """Validation draws clip i % clips at noise level i % 8; clips differ, and their differences have the mean 0."""
    draw, margins = np.random.default_rng(0), []
    numbers = np.arange(8 * clips)
    for _ in range(300):
        values = draw.normal(size=clips)[numbers % clips] + 0.1 * draw.normal(size=len(numbers))
        margins.append(margin(values.tolist(), (numbers % 8).tolist(), [f"clip-{k}" for k in numbers % clips]) or 0.0)
    assert np.mean(np.abs(margins) < 3) > 0.9 and np.median(np.abs(margins)) < 1.2
