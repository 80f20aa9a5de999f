"""A claim counts as shown only where its error is known."""

from __future__ import annotations

from evaluation.claims import paired_claim, share_claim


def test_few_samples_show_nothing() -> None:
    assert not share_claim("seen", [True, True], "chance", 0.05).shown
    assert share_claim("seen", [True] * 8, "chance", 0.05).shown
    assert not paired_claim("better", [1.0, 1.0001], "control", [0.0, 0.0]).shown
