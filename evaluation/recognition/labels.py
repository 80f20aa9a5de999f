"""Clips of the synthetic worlds with the truth about them, read from the videos of the stage `sources`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from svd.core.errors import UserError
from svd.latents.windows import cover_frames, decode_frames
from svd.media.video import Frames
from svd.synthetic.scenes import Split

RECOGNISED = ("colour", "shape", "action")  # what the classifier is asked
ATTRIBUTES = (*RECOGNISED, "camera")
_SPOILT = ("blur", "text")  # planted defects that hide what is asked


@dataclass(frozen=True)
class ClipShape:
    """The shape of the clips that are compared: frames T at `fps`, of height x width pixels."""

    frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class LabelledClip:
    """A clip (T, H, W, 3) uint8, its true caption, and its labels by attribute."""

    frames: Frames
    caption: str
    labels: Mapping[str, str]


def has_labels(sources: Path) -> bool:
    """Return whether the footage holds synthetic worlds, whose truth is known."""
    return (sources / "truth.json").is_file()


def read_labelled(sources: Path, split: Split, count: int, shape: ClipShape, windows: int = 1) -> list[LabelledClip]:
    """Read up to `count` scenes of a split, spread over its videos, each as `windows` clips spread over the scene.

    Scenes that are blurred, hidden by text, or shorter than a clip are left out. Raises UserError when none is left.
    """
    truth: dict[str, Any] = json.loads((sources / "truth.json").read_text())
    videos = sorted(name for name in truth if name.startswith(f"{split}/"))
    per_video = -(-count // max(1, len(videos)))
    found: list[LabelledClip] = []
    for name in tqdm(videos, f"labelled clips: {split}", unit="video", leave=False, delay=2):
        scenes = [s for s in truth[name]["scenes"] if not any(s.get(flag) for flag in _SPOILT)]
        starts = [(s, _starts(s, truth[name]["fps"], shape, windows)) for s in scenes]
        if usable := [pair for pair in starts if pair[1]][:per_video]:
            found += _read(sources / name, truth[name]["fps"], usable, shape)
    if not found:
        raise UserError(f"{sources / 'truth.json'}: no {split} scene holds {shape.frames} frames at {shape.fps:g} fps")
    return found[: count * windows]


def _stride(video_fps: float, shape: ClipShape) -> int:
    return max(1, round(video_fps / shape.fps))


def _starts(scene: Mapping[str, Any], fps: float, shape: ClipShape, windows: int) -> list[int]:
    """Return the first frames of clips spread over a scene; one clip lies in its middle."""
    free = scene["end_frame"] - scene["start_frame"] - ((shape.frames - 1) * _stride(fps, shape) + 1)
    if free < 0:
        return []
    places = np.linspace(0, free, windows + 2)[1:-1] if windows == 1 else np.linspace(0, free, windows)
    return [scene["start_frame"] + round(float(place)) for place in places]


def _read(
    path: Path, fps: float, scenes: Sequence[tuple[Mapping[str, Any], list[int]]], shape: ClipShape
) -> list[LabelledClip]:
    """Decode the clips of one video, with the frames of a start at every stride-th frame from there on."""
    stride = _stride(fps, shape)
    numbers = {first: range(first, first + shape.frames * stride, stride) for _, starts in scenes for first in starts}
    frames = decode_frames(path.read_bytes(), {number for chosen in numbers.values() for number in chosen})
    clips = []
    for scene, starts in scenes:
        labels = {name: str(scene[name]) for name in ATTRIBUTES}
        for first in starts:
            pixels = cover_frames([frames[number] for number in numbers[first]], shape.height, shape.width)
            clips.append(LabelledClip(pixels.permute(0, 2, 3, 1).numpy(), scene["caption"], labels))
    return clips
