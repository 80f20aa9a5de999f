"""The invisible watermark."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svd.core.errors import UserError
from svd.media import watermark
from svd.media.video import read_frames, write_mp4
from svd.synthetic.scenes import World, render_clip


@pytest.fixture(scope="module")
def frames():
    return render_clip(World(0, "train"), 4, 6, 128, 192, 8).frames


@settings(deadline=None, max_examples=15)
@given(message=st.binary(min_size=6, max_size=6))
def test_any_message_is_read_back(message):
    clip = render_clip(World(1, "train"), 2, 3, 128, 192, 8).frames
    assert watermark.read(watermark.embed(clip, message)) == message


def test_the_mark_is_invisible_and_absent_before(frames):
    marked = watermark.embed(frames)
    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs((marked.astype(float) - frames) @ luma).mean() < 1.5
    assert 10 * np.log10(255**2 / np.square(marked.astype(float) - frames).mean()) > 30
    assert watermark.read(frames) != watermark.MESSAGE
    assert watermark.read(marked) == watermark.MESSAGE


@pytest.mark.parametrize("crf", [10, 18, 23])
def test_the_mark_survives_h264(frames, tmp_path, crf):
    write_mp4(tmp_path / "marked.mp4", watermark.embed(frames), 8, crf=crf)
    assert watermark.read(read_frames(tmp_path / "marked.mp4")[0]) == watermark.MESSAGE


def test_sizes_that_are_no_multiple_of_eight(frames):
    cut = frames[:, :125, :190]
    assert watermark.read(watermark.embed(cut)) == watermark.MESSAGE
    rim = np.abs(watermark.embed(cut)[:, 120:, 184:].astype(int) - cut[:, 120:, 184:])
    assert rim.max() <= 3  # only the rounding of the colour conversion


def test_too_small_frames_are_refused(frames):
    with pytest.raises(UserError, match="hold 16 marks"):
        watermark.embed(frames[:, :32, :32])


def test_layout_of_the_published_method():
    """The reference decoder, written out: block n of the Haar approximation of U holds bit n modulo the length."""
    import cv2

    frame = render_clip(World(2, "train"), 0, 1, 64, 96, 8).frames
    marked = watermark.embed(frame, b"\xa5\x0f\x33\x55\x01\xfe")[0]
    u = cv2.cvtColor(marked, cv2.COLOR_RGB2YUV)[..., 1].astype(float)
    band = (u[::2, ::2] + u[1::2, ::2] + u[::2, 1::2] + u[1::2, 1::2]) / 2
    votes = [[] for _ in range(48)]
    number = 0
    for i in range(0, 32, 4):
        for j in range(0, 48, 4):
            block = np.abs(band[i : i + 4, j : j + 4].flatten())
            votes[number % 48].append(block[1 + block[1:].argmax()] % 36 > 18)
            number += 1
    bits = np.packbits([np.mean(v) > 0.5 for v in votes]).tobytes()
    right = np.unpackbits(np.frombuffer(bits, np.uint8)) == np.unpackbits(
        np.frombuffer(b"\xa5\x0f\x33\x55\x01\xfe", np.uint8)
    )
    assert right.all()
