"""Turned and mirrored sources: everything that reads them sees what a player shows, in all eight orientations."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from media_files import MATRICES, Kind, Matrix, coded, decode_rgb, scenery, shots, shown, tiny_config, write

from svd.catalogue.browser.app import transcode
from svd.curation.captions.video import sample_frames
from svd.curation.clips.samples import DisplayGeometry
from svd.curation.clips.writer import write_clips
from svd.curation.measuring.decode_pass import analyse
from svd.curation.motion.camera_velocity import track_camera
from svd.latents.windows import decode_frames
from svd.media.orientation import UPRIGHT, Orientation, from_matrix
from svd.media.video import read_frames
from svd.training.frames import read_clip_frames as read_training_frames

EACH = pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
FLAT = {"cuts__passes": [{"detector": "content", "threshold": 250}]}  # no cuts: one clip a file


def differ(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference in levels; pictures of `scenery` that are turned otherwise differ by 20 and more."""
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other).mean())


def matrix_of(path: Path) -> list[int]:
    """a, b, c, d of the display matrix that the decoder reports."""
    with av.open(str(path)) as container:
        data = next(container.decode(video=0)).side_data.get("DISPLAYMATRIX")
    return [1, 0, 0, 1] if data is None else [int(n) >> 16 for n in np.frombuffer(data, np.int32)[[0, 1, 3, 4]]]


@EACH
def test_pictures_are_turned_pixel_by_pixel(matrix: Matrix) -> None:
    picture = np.arange(24, dtype=np.uint8).reshape(4, 6)
    a, b, c, d = matrix
    orientation = from_matrix(np.array([a, b, 0, c, d, 0, 0, 0, 1]) * 65536)
    assert np.array_equal(orientation.upright(picture), shown(picture, matrix))
    assert np.array_equal(orientation.upright(coded(picture, matrix)), picture)
    assert orientation.sideways == (a == 0)


def test_the_eight_orientations_differ() -> None:
    found = {from_matrix(np.array([a, b, 0, c, d, 0, 0, 0, 1])) for a, b, c, d in MATRICES.values()}
    assert found == {Orientation(turn, mirrored) for turn in (0, 90, 180, 270) for mirrored in (False, True)}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0] * 9, UPRIGHT),
        ([0, 0, 0, 65536, 65536, 0, 0, 0, 1 << 30], UPRIGHT),  # everything on one line: no picture at all
        ([60000, 3000, 0, -3000, 60000, 0, 9, 9, 1 << 30], UPRIGHT),  # some degrees, scaled and shifted
        ([-(1 << 31), 0, 0, 0, (1 << 31) - 1, 0, 0, 0, 1 << 30], Orientation(0, True)),
    ],
)
def test_odd_matrices_give_the_nearest_orientation(values: list[int], expected: Orientation) -> None:
    assert from_matrix(np.array(values, np.int32)) == expected


@EACH
def test_every_reader_shows_what_a_player_shows(matrix: Matrix, tmp_path: Path) -> None:
    """Frames for training, evaluation, video captioners and the browser's preview of one file."""
    frames = [scenery(seed, 64, 96) for seed in (1, 2, 3)]
    path = write(tmp_path / "v", frames, kind=Kind(matrix=matrix))
    expected = [shown(frame, matrix) for frame in frames]
    height, width = expected[0].shape[:2]
    preview = tmp_path / "preview.mp4"
    preview.write_bytes(transcode(path.read_bytes()))
    seen = {
        "training, second stage": list(decode_frames(path.read_bytes(), {0, 1, 2}).values()),
        "training, first stage": list(
            read_training_frames(path.read_bytes(), 3, height, width).permute(0, 2, 3, 1).numpy()
        ),
        "evaluation": list(read_frames(path)[0]),
        "captions": sample_frames(path, 3).images,
        "preview": decode_rgb(preview),
    }
    for reader, pictures in seen.items():
        assert len(pictures) == 3
        assert max(map(differ, pictures, expected)) < 8, reader


@EACH
def test_sources_give_shown_samples_and_clips(matrix: Matrix, tmp_path: Path) -> None:
    """Samples are as shown; the matrix survives copying; a re-encoded clip needs none."""
    frames = list(shots([40, 40]))
    kind = Kind(matrix=matrix, gop=1000, options={"x264-params": "scenecut=0"})
    source = write(tmp_path / "source", frames, kind=kind)
    analysis = analyse(source, tiny_config())
    starts = [round(clip.frame_seconds[0] * 24) for clip in analysis.clips]
    for clip, start in zip(analysis.clips, starts, strict=True):
        assert differ(clip.frames[0], shown(frames[start], matrix)) < 6
    first, second = (shown(frames[n], matrix) for n in (0, 40))
    facts = analysis.facts
    assert (facts.display_height, facts.display_width) == first.shape[:2]
    assert [c.span.method for c in analysis.clips] == ["copy", "reencode"]
    targets = [tmp_path / "copied.mp4", tmp_path / "encoded.mp4"]
    copied, encoded = write_clips(
        source, facts, [(c.span, target) for c, target in zip(analysis.clips, targets, strict=True)]
    )
    assert (copied.height, copied.width) == (encoded.height, encoded.width) == first.shape[:2]
    assert matrix_of(targets[0]) == list(matrix) and matrix_of(targets[1]) == [1, 0, 0, 1]
    for target, expected in zip(targets, (first, second), strict=True):
        assert differ(decode_frames(target.read_bytes(), {0})[0], expected) < 6
    assert differ(decode_rgb(targets[1])[0], second) < 6, "the re-encoded pixels themselves are turned"


@EACH
def test_a_pan_is_labelled_as_it_is_shown(matrix: Matrix, tmp_path: Path) -> None:
    """The content slides to the left in what a player shows: the camera pans right, however the file is coded."""
    frames = list(shots([60], height=96, width=96, speed=1.0, seed=5))
    (plain,) = analyse(write(tmp_path / "plain", frames), tiny_config(**FLAT)).clips
    frames = [coded(frame, matrix) for frame in frames]
    (clip,) = analyse(write(tmp_path / "v", frames, kind=Kind(matrix=matrix)), tiny_config(**FLAT)).clips
    assert clip.camera.label == plain.camera.label == "pan-right"
    assert clip.camera.pan == pytest.approx(plain.camera.pan, rel=0.1)
    middle = clip.flow.astype(float).mean((0, 1, 2))
    assert middle[0] < -5 * abs(middle[1])


@EACH
def test_motion_is_turned_as_the_pictures_are(matrix: Matrix) -> None:
    """Tracking the coded pictures and turning what it finds is tracking the shown ones: shift, growth and roll."""
    one = cv2.GaussianBlur(scenery(4, 30, 48)[..., 0], (0, 0), 1.5)
    warp = np.array([[1.008, -0.012, 0.4], [0.012, 1.008, -0.9]])
    pair = np.stack([one, cv2.warpAffine(one, warp, (48, 30), borderMode=cv2.BORDER_REFLECT)])
    a, b, c, d = matrix
    geometry = DisplayGeometry(from_matrix(np.array([a, b, 0, c, d, 0, 0, 0, 1])), (30, 48) if a == 0 else (48, 30))
    expected = track_camera(np.stack([shown(picture, matrix) for picture in pair]))
    assert np.abs(expected).min() > 0.003
    assert geometry.upright_motion(track_camera(pair)) == pytest.approx(expected, abs=1e-4)
