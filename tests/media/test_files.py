"""Prompts, pictures and clips as files."""

import numpy as np
import pytest
import torch
from PIL import Image

from svd.core.errors import UserError
from svd.media import watermark
from svd.media.clips import load_video, save_clip
from svd.media.images import read_image, read_images
from svd.media.video import read_comment, read_frames


@pytest.fixture
def clip():
    ramp = torch.linspace(0, 1, 64)
    return torch.stack([ramp.expand(48, 64).roll(t, -1).expand(3, 48, 64) for t in range(4)])


def test_pictures_keep_their_values_and_lose_transparency(tmp_path):
    pixels = np.array([[[255, 0, 0, 255], [0, 255, 0, 0]], [[0, 0, 255, 255], [0, 0, 0, 128]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    picture = read_image(tmp_path / "rgba.png")
    assert picture.shape == (3, 2, 2)
    assert picture[:, 0, 0].tolist() == [1, 0, 0]
    assert picture[:, 0, 1].tolist() == [1, 1, 1]
    assert picture[0, 1, 1].item() == pytest.approx(0.5, abs=0.01)
    assert read_images([tmp_path / "rgba.png"] * 2, (16, 16)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_pictures_of_phones_are_read_as_viewers_show_them(tmp_path, orientation, suffix):
    """The eight orientations of EXIF: what its first row and first column of stored pixels are."""
    stored = np.kron(np.array([[0, 80, 160], [240, 40, 120]], np.uint8), np.ones((16, 16), np.uint8))
    down, right = stored, stored.T
    shown = [down, down[:, ::-1], down[::-1, ::-1], down[::-1], right, right[:, ::-1], right[::-1, ::-1], right[::-1]]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"phone.{suffix}"
    Image.fromarray(np.stack([stored] * 3, -1)).save(path, exif=exif)
    expected = shown[orientation - 1] / 255
    picture = read_image(path)[0].numpy()
    assert picture.shape == expected.shape and np.abs(picture - expected).max() < 0.03
    if orientation in (1, 3, 6, 8):  # turned, not mirrored: all that PyAV tells of a picture with EXIF
        frame = read_frames(path)[0][0, :, :, 0] / 255
        assert frame.shape == expected.shape and np.abs(frame - expected).max() < 0.03


@pytest.mark.parametrize("orientation", [1, 6])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, orientation):
    stored = np.linspace(0, 65535, 64).reshape(4, 16).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "deep.png", exif=exif)
    expected = stored / 65535 if orientation == 1 else np.rot90(stored / 65535, -1)
    assert np.abs(read_image(tmp_path / "deep.png").numpy() - expected).max() <= 0.51 / 255


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tiff"])
def test_a_still_is_the_same_image_for_every_reader(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    path = tmp_path / f"still{suffix}"
    Image.fromarray(pixels).save(path)
    (frame,), _ = read_frames(path)
    assert np.array_equal(frame, (read_image(path).permute(1, 2, 0) * 255).round().byte().numpy())
    assert torch.equal(load_video(path)[0], read_image(path)[None])


def test_a_still_that_is_none_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"bad\.png: not a readable picture"):
        read_frames(tmp_path / "bad.png")


def test_unreadable_pictures_are_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"bad\.png: not a readable picture"):
        read_image(tmp_path / "bad.png")
    with pytest.raises(UserError, match=r"absent\.png: no such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(UserError, match=r"holds no \.png"):
        load_video(tmp_path / "..")


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "frames"])
def test_clips_round_trip(tmp_path, clip, name):
    save_clip(tmp_path / name, clip, 5, {"prompt": "x"})
    loaded, fps = load_video(tmp_path / name)
    assert loaded.shape == clip.shape
    assert fps == (1 if name == "frames" else 5)
    assert (loaded - clip).abs().mean() < 0.03


def test_one_frame_as_png_and_metadata(tmp_path, clip):
    save_clip(tmp_path / "one.png", clip[:1], 5, {"seed": "3"})
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.text == {"seed": "3"}
    save_clip(tmp_path / "clip.mp4", clip, 5, {"seed": "3"})
    assert read_comment(tmp_path / "clip.mp4") == {"seed": "3"}


def test_unknown_formats_are_refused(tmp_path, clip):
    with pytest.raises(UserError, match=r"unknown format '\.avi'"):
        save_clip(tmp_path / "clip.avi", clip, 5)
    with pytest.raises(UserError, match="one frame, not 4"):
        save_clip(tmp_path / "clip.png", clip, 5)


def test_watermark_on_request(tmp_path):
    torch.manual_seed(0)
    clip = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 12), (128, 192), mode="bilinear")
    save_clip(tmp_path / "clip.mp4", clip, 5, mark=watermark.MESSAGE)
    assert watermark.read(read_frames(tmp_path / "clip.mp4")[0]) == watermark.MESSAGE
