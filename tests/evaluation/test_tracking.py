"""Tracked shapes: what a plain scene shows is seen, forwards and backwards, and nothing is seen where nothing is."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.recognition.tracking import ACTIONS, ShapePath, action_of, find_path
from svd.synthetic.scenes import Clip, World, render_clip

OPPOSITE = {"moving up": "moving down", "moving down": "moving up"}


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    world = World(0, "test", "plain")
    return [render_clip(world, index, 6, 64, 64, 6) for index in range(48)]


def test_the_object_motion_of_real_clips_is_seen_and_turned_round_when_they_run_backwards(clips: list[Clip]) -> None:
    cameras = ["object-motion" if clip.camera == "static" else clip.camera for clip in clips]
    for clip, camera in zip(clips, cameras, strict=True):
        assert clip.action in ACTIONS
        assert action_of(find_path(clip.frames, clip.colour), camera) == clip.action
        backwards = action_of(find_path(clip.frames[::-1], clip.colour), camera)
        assert backwards == OPPOSITE.get(clip.action, clip.action)


def test_a_shape_of_another_colour_and_an_empty_frame_show_nothing(clips: list[Clip]) -> None:
    for clip in clips[:12]:
        other = "blue" if clip.colour != "blue" else "yellow"
        assert action_of(find_path(clip.frames, other), "object-motion") == "no shape"
    assert action_of(find_path(np.full((6, 64, 64, 3), 90, np.uint8), "red"), "static") == "no shape"


def test_zooms_make_a_shape_grow_or_shrink(clips: list[Clip]) -> None:
    zooms = [
        (clip.camera == "zoom-in", find_path(clip.frames, clip.colour).growth)
        for clip in clips
        if "zoom" in clip.camera
    ]
    assert len(zooms) > 8 and all((growth > 0.1) == inwards and abs(growth) > 0.1 for inwards, growth in zooms)


@pytest.mark.parametrize(
    "way, seen", [((0.05, 0), "standing still"), ((0.1, 0.08), "moving right"), ((0.1, -0.2), "moving up")]
)
def test_the_nearest_direction_counts_from_a_distance_on(way: tuple[float, float], seen: str) -> None:
    path = ShapePath(np.array([[0, 0], [0, 0], way, way]), np.full(4, 50.0))
    assert action_of(path, "static") == seen and action_of(path, "zoom-in") == "standing still"
