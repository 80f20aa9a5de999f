"""Sharpness, exposure and bars: right on pictures whose truth is known, whatever their size and their bars."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from svd.curation.measuring import picture_scores

TEXTURE = np.random.default_rng(0).integers(40, 216, (144, 256, 3)).astype(np.uint8)


def frames(height: int = 288, width: int = 512, blur: float = 0.0) -> np.ndarray:
    picture = cv2.resize(TEXTURE, (width, height), interpolation=cv2.INTER_CUBIC)
    picture = cv2.GaussianBlur(picture, (0, 0), blur * height / 288) if blur else picture
    return np.stack([picture] * 3)


def test_sharpness_falls_with_blur_and_not_with_size():
    values = [picture_scores.sharpness(frames(blur=blur)) for blur in (0.0, 1.0, 2.0, 4.0, 8.0)]
    assert values == sorted(values, reverse=True) and values[0] > 5 * values[2] > 25 * values[4] > 0
    large, small = picture_scores.sharpness(frames(576, 1024, 2.0)), picture_scores.sharpness(frames(288, 512, 2.0))
    assert large == pytest.approx(small, rel=0.1)
    thumbnail = np.stack([cv2.resize(one, (64, 36), interpolation=cv2.INTER_AREA) for one in frames()])
    assert picture_scores.sharpness(thumbnail) < values[0], "an enlarged small picture is not sharp"
    assert picture_scores.sharpness(np.full((3, 90, 160, 3), 99, np.uint8)) == 0


@pytest.mark.parametrize(("top", "left"), [(0, 0), (36, 0), (0, 64), (36, 64)])
def test_bars_are_measured_and_change_no_other_score(top, left):
    open_frames, held = frames(), frames()
    noise = np.random.default_rng(1).integers(0, 8, held.shape).astype(np.uint8)
    inside = np.zeros(held.shape, bool)
    inside[:, top : 288 - top, left : 512 - left] = True
    held = np.where(inside, held, noise)
    assert picture_scores.bars(held) == pytest.approx(1 - inside.mean())
    cropped = open_frames[:, top : 288 - top, left : 512 - left]
    for score in (picture_scores.sharpness, picture_scores.mean_luma, picture_scores.clipped):
        assert score(held) == score(cropped)


def test_a_fade_and_a_black_clip_have_no_bars():
    faded = frames()
    faded[0] = 0
    assert picture_scores.bars(faded) == 0
    assert picture_scores.mean_luma(faded) == picture_scores.mean_luma(frames())
    black = np.zeros((3, 90, 160, 3), np.uint8)
    assert (picture_scores.bars(black), picture_scores.mean_luma(black), picture_scores.clipped(black)) == (0, 0, 1)


def test_clipped_pixels_are_counted_at_both_ends():
    picture = np.full((3, 100, 100, 3), 128, np.uint8)
    picture[:, 10:20], picture[:, 50:70] = 255, 2
    assert picture_scores.clipped(picture) == pytest.approx(0.3)
