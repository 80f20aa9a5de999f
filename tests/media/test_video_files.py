"""Clips on disk: mp4, GIF, PNG."""

import av
import numpy as np
import pytest
from PIL import Image

from svd.core.errors import UserError
from svd.media.video import (
    filmstrip,
    read_comment,
    read_frames,
    to_uint8,
    write_gif,
    write_mp4,
    write_png,
    write_png_sequence,
)


@pytest.fixture
def clip():
    """A smooth moving gradient: survives compression."""
    t, y, x = np.meshgrid(np.arange(9), np.arange(32), np.arange(48), indexing="ij")
    return np.stack([x * 4 + t * 5, y * 6, 255 - x * 4], -1).clip(0, 255).astype(np.uint8)


def test_mp4_round_trip(tmp_path, clip):
    path = tmp_path / "new" / "clip.mp4"
    write_mp4(path, clip, 7, {"prompt": "a red ball", "seed": "3"}, crf=4)
    frames, fps = read_frames(path)
    assert frames.shape == clip.shape
    assert fps == 7
    assert np.abs(frames.astype(int) - clip).mean() < 4
    assert read_comment(path) == {"prompt": "a red ball", "seed": "3"}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_equal_frames_give_equal_bytes(tmp_path, clip):
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, clip, 30000 / 1001, {"b": "2", "a": "1"})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert read_frames(tmp_path / "a.mp4")[1] == pytest.approx(30000 / 1001)


def test_keyframe_interval(tmp_path, clip):
    write_mp4(tmp_path / "k.mp4", clip, 8, keyframe_interval=3)
    with av.open(str(tmp_path / "k.mp4")) as container:
        keys = [i for i, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert keys == [0, 3, 6]


def test_a_failed_write_leaves_the_old_file(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    write_mp4(path, clip, 7)
    before = path.read_bytes()
    with pytest.raises(UserError, match="even height and width"):
        write_mp4(path, clip[:, :31], 7)
    with pytest.raises(UserError, match="frame rate"):
        write_mp4(path, clip, 0)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_wrong_arrays_are_refused(tmp_path, clip):
    for bad in (clip.astype(np.float32), clip[0], clip[:0], clip[..., :2]):
        with pytest.raises(ValueError, match="uint8"):
            write_mp4(tmp_path / "bad.mp4", bad, 7)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with pytest.raises(UserError, match=r"broken\.mp4"):
        read_frames(tmp_path / "broken.mp4")
    with pytest.raises(UserError, match=r"absent\.mp4"):
        read_frames(tmp_path / "absent.mp4")


def test_read_stops_early(tmp_path, clip):
    write_mp4(tmp_path / "clip.mp4", clip, 7)
    assert len(read_frames(tmp_path / "clip.mp4", max_frames=4)[0]) == 4


def test_gif_and_png(tmp_path, clip):
    write_gif(tmp_path / "clip.gif", clip, 10, {"seed": "1"})
    with Image.open(tmp_path / "clip.gif") as picture:
        assert picture.n_frames == len(clip)
        assert picture.info["duration"] == 100
        assert picture.info["loop"] == 0
        assert b'"seed": "1"' in picture.info["comment"]
    paths = write_png_sequence(tmp_path / "frames", clip, {"prompt": "blå ball"})
    assert [p.name for p in paths][:2] == ["0000.png", "0001.png"]
    with Image.open(paths[3]) as picture:
        assert np.array_equal(np.asarray(picture), clip[3])
        assert picture.text["prompt"] == "blå ball"
    write_png(tmp_path / "one.png", clip[0])
    assert np.array_equal(read_frames(tmp_path / "one.png")[0][0], clip[0])


def test_filmstrip_takes_first_and_last(clip):
    strip = filmstrip(clip, 3)
    assert strip.shape == (32, 3 * 48, 3)
    assert np.array_equal(strip[:, :48], clip[0])
    assert np.array_equal(strip[:, 48:96], clip[4])
    assert np.array_equal(strip[:, 96:], clip[8])
    assert filmstrip(clip[:2], 8).shape == (32, 96, 3)


def test_to_uint8_rounds_and_clips():
    video = np.array([-0.1, 0.0, 0.5, 1.0, 1.2, 0.999], dtype=np.float32).reshape(2, 3, 1, 1)
    assert to_uint8(video).reshape(-1).tolist() == [0, 0, 128, 255, 255, 255]
