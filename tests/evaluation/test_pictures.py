"""The grid of generated and real film strips: sizes, and labels that stay in their own column."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from evaluation.frechet.comparison_grid import comparison_grid, fitted

FONT = ImageFont.load_default(11)


def test_long_class_names_stay_in_their_column() -> None:
    """Right of the generated strip's end lies a gap that nothing is drawn into, however long the label is."""
    clip = np.zeros((8, 32, 40, 3), np.uint8)
    sheet = comparison_grid([("BlueDottedDiamondSpinningOverYellowDots" * 3, clip, clip)], frames=4)
    assert sheet.shape == (32 + 15 + 2 * 4, 2 * 160 + 3 * 4, 3)
    assert (sheet[:, 4 + 160 : 4 + 160 + 4] == 250).all()
    assert (sheet[:, -4:] == 250).all()


def test_a_label_is_cut_only_when_it_is_too_wide() -> None:
    assert fitted("generated · Ring", 300, FONT) == "generated · Ring"
    cut = fitted("generated · " + "Ring" * 40, 300, FONT)
    assert cut.startswith("generated · Ring") and cut.endswith("…") and FONT.getlength(cut) <= 300


def test_no_clips() -> None:
    with pytest.raises(ValueError, match="no clips"):
        comparison_grid([])
