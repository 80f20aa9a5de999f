"""The synthetic worlds: what the captions and the truth say is what the pixels show."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.frame import PictureType
from hypothesis import given, settings
from hypothesis import strategies as st

from svd.config import SyntheticWorlds
from svd.media.video import read_frames
from svd.synthetic.drawing import COLOURS, smooth_tile
from svd.synthetic.scenes import (
    ACTIONS,
    CAMERAS,
    PLAIN_BACKGROUNDS,
    Scene,
    World,
    camera_pose,
    combinations,
    object_poses,
    render_clip,
    render_scene,
    still,
)
from svd.synthetic.videos import plan_video, render_video, write_worlds

SMALL = SyntheticWorlds(train_videos=2, test_videos=1, scenes_per_video=5, height=64, width=96, fps=24)


def median_flow(frames: np.ndarray) -> np.ndarray:
    """Median displacement (dx, dy) in pixels a frame over the border, where the background is."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    steps = []
    for a, b in itertools.pairwise(grey):
        flow = cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 21, 3, 7, 1.5, 0)
        border = np.concatenate([flow[:10].reshape(-1, 2), flow[-10:].reshape(-1, 2)])
        steps.append(np.median(border, 0))
    return np.mean(steps, 0)


def scene_with(**changes: object) -> Scene:
    """A textured scene (clouds give flow in every direction) with the given changes."""
    scene = dataclasses.replace(World(3, "train").scene(0), background="clouds", action="standing still")
    return dataclasses.replace(scene, **changes)  # type: ignore[arg-type]


def test_same_scene_same_pixels_and_other_index_other_pixels() -> None:
    first = render_clip(World(1, "train"), 4, 6, 48, 64, 12).frames
    assert np.array_equal(first, render_clip(World(1, "train"), 4, 6, 48, 64, 12).frames)
    for other in (render_clip(World(1, "train"), 5, 6, 48, 64, 12), render_clip(World(2, "train"), 4, 6, 48, 64, 12)):
        assert np.abs(first.astype(int) - other.frames).mean() > 5


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.sampled_from(["train", "test"]))
@settings(max_examples=60, deadline=None)
def test_captions_name_what_the_scene_is(seed: int, index: int, split: str) -> None:
    scene = World(seed, split).scene(index)  # type: ignore[arg-type]
    assert scene.thing.colour in scene.caption and scene.thing.shape in scene.caption
    assert scene.action in scene.caption and CAMERAS[scene.camera] in scene.caption
    assert f"{scene.background_colour} {scene.background}" in scene.caption
    assert scene.thing.colour != scene.background_colour
    assert not (scene.action == "standing still" and scene.camera == "static")


def test_train_and_test_share_words_but_no_combination() -> None:
    (train, train_grounds), (test, test_grounds) = combinations("train"), combinations("test")
    assert not set(train) & set(test) and not set(train_grounds) & set(test_grounds)
    for words in ("shape", "colour", "texture"):
        assert {getattr(t, words) for t in train} == {getattr(t, words) for t in test}
    assert {g[0] for g in train_grounds} == {g[0] for g in test_grounds}
    assert 0.1 < len(test) / (len(test) + len(train)) < 0.4
    drawn = {w: [World(0, w).scene(i) for i in range(300)] for w in ("train", "test")}  # type: ignore[arg-type]
    assert not {s.thing for s in drawn["train"]} & {s.thing for s in drawn["test"]}
    assert {s.action for s in drawn["train"]} == {s.action for s in drawn["test"]} == set(ACTIONS)
    assert {s.camera for s in drawn["train"]} == {s.camera for s in drawn["test"]} == set(CAMERAS)


def motion_of(scene: Scene) -> str:
    """The one motion of a plain scene."""
    return scene.action if scene.camera == "static" else scene.camera


def test_a_plain_world_is_small_and_its_splits_share_words_but_no_scene() -> None:
    drawn = {split: [World(0, split, "plain").scene(i) for i in range(3000)] for split in ("train", "test")}  # type: ignore[arg-type]
    words = [
        {(s.thing.shape, s.thing.colour, s.background, s.background_colour, motion_of(s)) for s in scenes}
        for scenes in drawn.values()
    ]
    assert [len(found) for found in words] == [432, 144] and not words[0] & words[1]
    for position in range(5):
        assert {found[position] for found in words[0]} == {found[position] for found in words[1]}
    # A caption names one motion, and tells apart whatever differs.
    assert len({s.caption for scenes in drawn.values() for s in scenes}) == 576
    for scene in drawn["test"][:50]:
        assert (scene.action == "standing still") != (scene.camera == "static")
        assert scene.caption.startswith(f"a {scene.thing.colour} {scene.thing.shape} ")
        named = scene.action in scene.caption, CAMERAS[scene.camera] in scene.caption
        assert named == (scene.camera == "static", scene.camera != "static")


@pytest.mark.parametrize("kind", PLAIN_BACKGROUNDS)
def test_the_tiles_of_the_plain_world_are_smooth_and_have_no_seam(kind: str) -> None:
    tile = smooth_tile(kind, "green", 128).astype(int)
    for axis in (0, 1):
        steps = np.abs(np.diff(tile, axis=axis, append=tile.take([0], axis=axis)))
        assert steps.mean() > 0 and steps.max() < 12
    assert np.ptp(tile[..., 1]) > 50


def test_a_plain_scene_shows_what_its_caption_says() -> None:
    """An even shape on a background of another colour; only what the caption names moves."""
    world = World(2, "train", "plain")
    seen = {motion_of(scene): scene for scene in map(world.scene, range(60))}
    assert len(seen) == 8
    for motion, scene in seen.items():
        frames = render_scene(dataclasses.replace(scene, start=(0.0, 0.0)), 9, 96, 96, 12).astype(int)
        middle = frames[4, 44:52, 46:50].reshape(-1, 3)
        assert np.abs(middle - COLOURS[scene.thing.colour]).max() <= 2
        corners = np.abs(frames[0] - frames[8])[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners.max() == 0) == (scene.camera == "static")
        assert np.abs(frames[0] - frames[8]).mean() > 2, motion


@pytest.mark.parametrize(
    ("camera", "direction"),
    [("pan-left", (1, 0)), ("pan-right", (-1, 0)), ("tilt-up", (0, 1)), ("tilt-down", (0, -1))],
)
def test_background_moves_against_the_camera(camera: str, direction: tuple[int, int]) -> None:
    frames = render_scene(scene_with(camera=camera, camera_speed=1.0), 8, 96, 144, 12)
    flow = median_flow(frames)
    expected = {"p": 0.4, "t": 0.35}[camera[0]] * 96 / 12
    along = float(np.dot(flow, direction))
    assert 0.7 * expected < along < 1.3 * expected
    assert abs(flow[0] * direction[1]) + abs(flow[1] * direction[0]) < 0.3 * expected


@pytest.mark.parametrize(("camera", "sign"), [("zoom-in", 1), ("zoom-out", -1)])
def test_zoom_scales_the_background(camera: str, sign: int) -> None:
    frames = render_scene(scene_with(camera=camera, camera_speed=1.0), 6, 96, 144, 12)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flow = cv2.calcOpticalFlowFarneback(grey[0], grey[1], None, 0.5, 3, 21, 3, 7, 1.5, 0)
    left, right = np.median(flow[:, :20, 0]), np.median(flow[:, -20:, 0])
    assert sign * (right - left) > 1.0


def test_camera_poses_have_the_right_sense() -> None:
    offset, _, _ = camera_pose(scene_with(camera="pan-right"), 1.0)
    assert offset[0] > 0 and offset[1] == 0
    assert camera_pose(scene_with(camera="zoom-in"), 1.0)[1] > 1 > camera_pose(scene_with(camera="zoom-out"), 1.0)[1]
    assert camera_pose(scene_with(camera="roll", sign=1), 1.0)[2] > 0
    shaken = [camera_pose(scene_with(camera="handheld"), t)[0] for t in np.linspace(-1, 1, 50)]
    turns = np.diff(np.sign(np.diff(np.array(shaken)[:, 0])))
    assert np.count_nonzero(turns) >= 4


def test_actions_move_the_object() -> None:
    def path(action: str) -> list[tuple[float, float, float, float]]:
        scene = scene_with(action=action, sign=1)
        return [object_poses(scene, t, 1.0)[0][1:] for t in np.linspace(-1, 1, 21)]

    right, up = path("moving right"), path("moving up")
    assert right[-1][0] - right[0][0] > 0.7 and right[0][1] == right[-1][1]
    assert up[-1][1] - up[0][1] < -0.7
    assert path("growing")[-1][2] > 1.5 * path("growing")[0][2] > 0
    assert path("shrinking")[-1][2] < path("shrinking")[0][2] / 1.5
    assert path("spinning")[-1][3] - path("spinning")[0][3] > 2
    heights = np.array(path("bouncing"))[:, 1]
    assert np.count_nonzero(np.diff(np.sign(np.diff(heights)))) >= 2


def test_one_object_passes_behind_the_other() -> None:
    scene = scene_with(action="passing behind", camera="static")
    back, front = object_poses(scene, 0.0, 1.0)
    assert back[0] == scene.thing and front[0] == scene.other
    assert abs(back[1] - front[1]) < 0.05  # in the middle of the scene it is hidden
    orders = {object_poses(scene_with(action="orbiting"), t, 1.0)[0][0] == scene.thing for t in np.linspace(-1, 1, 20)}
    assert orders == {True, False}


def test_nothing_moves_in_a_still_scene() -> None:
    frames = render_scene(still(scene_with(camera="pan-left", action="spinning")), 5, 48, 64, 12)
    assert (frames == frames[0]).all()


def test_camera_labels() -> None:
    assert scene_with(camera="static", action="growing").camera_label == "object-motion"
    assert scene_with(camera="static").camera_label == "static"
    assert scene_with(camera="roll", action="growing").camera_label == "roll"


def test_a_moving_object_is_where_its_pose_says() -> None:
    scene = scene_with(action="moving right", camera="static", background="grid")
    frames = render_scene(scene, 9, 96, 144, 8).astype(int)
    empty = render_scene(dataclasses.replace(scene, size=0.001), 9, 96, 144, 8).astype(int)
    for i, t in ((0, -0.5), (4, 0.0), (8, 0.5)):
        changed = np.abs(frames[i] - empty[i]).sum(-1) > 30
        _, x, y, _, _ = object_poses(scene, t, 0.5)[0]
        rows, columns = np.nonzero(changed)
        assert abs(np.mean(columns) - (72 + 96 * x)) < 4 and abs(np.mean(rows) - (48 + 96 * y)) < 6


def test_plan_is_consistent_and_rendered_frame_by_frame() -> None:
    plan = plan_video(World(5, "train"), 0, 12, 32, 48, 24)
    frames = np.stack(list(render_video(plan)))
    assert len(frames) == plan.frames
    for before, after, transition in zip(plan.shots, plan.shots[1:], plan.transitions, strict=False):
        assert before.end_frame == transition.start_frame and after.start_frame == transition.end_frame
        jump = np.abs(frames[transition.end_frame].astype(int) - frames[before.end_frame - 1]).mean()
        assert jump > 8
        middle = (transition.start_frame + transition.end_frame - 1) // 2
        if transition.kind == "fade":
            assert frames[middle].mean() < 0.25 * frames[before.end_frame - 1].mean()
        if transition.kind == "dissolve":
            steps = np.abs(np.diff(frames[transition.start_frame - 1 : transition.end_frame + 1].astype(int), axis=0))
            assert steps.mean((1, 2, 3)).max() < 0.7 * jump
    assert {t.kind for t in plan.transitions} == {"hard", "fade", "dissolve"}


def test_planted_defects_are_there_and_true() -> None:
    world = World(6, "test")
    plans = [plan_video(world, index, 20, 64, 96, 24) for index in range(2)]
    shots = [shot for plan in plans for shot in plan.shots]
    counts = {name: sum(s.defect == name for s in shots) for name in ("static", "text", "wrong caption", "blur")}
    assert counts == {"static": 4, "text": 4, "wrong caption": 4, "blur": 2}
    for shot in shots:
        assert (shot.caption != shot.scene.caption) == (shot.defect == "wrong caption")
        if shot.defect == "wrong caption":
            assert not {shot.scene.thing.shape, shot.scene.thing.colour} & set(shot.caption.split(",")[0].split()[:4])
    clean, blurred = (
        next(i for i, s in enumerate(shots) if s.defect == kind and s.scene.background != "clouds")
        for kind in ("", "blur")
    )
    frames = [np.stack(list(render_video(plan))) for plan in plans]

    def sharpness(number: int) -> float:
        video, shot = frames[number // 20], shots[number]
        return float(cv2.Laplacian(cv2.cvtColor(video[shot.start_frame], cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())

    assert sharpness(blurred) < 0.2 * sharpness(clean)


def test_write_worlds_truth_sidecars_and_bytes(tmp_path: Path) -> None:
    counts = write_worlds(tmp_path / "a", SMALL, 7)
    truth = json.loads((tmp_path / "a" / "truth.json").read_text())
    assert set(truth) == {"train/train_0000.mp4", "train/train_0001.mp4", "test/test_0000.mp4"}
    assert counts["train"] == sum(v["frames"] for k, v in truth.items() if k.startswith("train"))
    for name, video in truth.items():
        frames, fps = read_frames(tmp_path / "a" / name)
        assert len(frames) == video["frames"] and fps == 24 and frames.shape[1:3] == (64, 96)
        sidecar = json.loads((tmp_path / "a" / name).with_suffix(".json").read_text())
        assert [s["caption"] for s in sidecar["scenes"]] == [s["sidecar_caption"] for s in video["scenes"]]
        assert "defect" not in json.dumps(sidecar) and "static" not in sidecar
    write_worlds(tmp_path / "b", SMALL, 7)
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_write_worlds_goes_on_after_a_kill(tmp_path: Path) -> None:
    write_worlds(tmp_path, SMALL, 7)
    kept, lost = tmp_path / "train/train_0000.mp4", tmp_path / "train/train_0001.mp4"
    content, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    (tmp_path / "train/.train_0001.mp4.tmp").write_bytes(b"half")
    write_worlds(tmp_path, SMALL, 7)
    assert lost.read_bytes() == content and kept.stat().st_mtime_ns == stamp
    assert not list(tmp_path.rglob(".*"))


def test_keyframes_are_close_and_some_videos_have_b_frames(tmp_path: Path) -> None:
    write_worlds(tmp_path, SMALL, 7)
    kinds = []
    for path in sorted((tmp_path / "train").glob("*.mp4")):
        with av.open(str(path)) as container:
            pictures = [(f.key_frame, PictureType(f.pict_type).name) for f in container.decode(video=0)]
        keys = [i for i, (is_key, _) in enumerate(pictures) if is_key]
        assert keys[0] == 0 and max(np.diff([*keys, len(pictures)])) <= 12
        kinds.append({kind for _, kind in pictures})
    assert any("B" in kind for kind in kinds) and any("B" not in kind for kind in kinds)
