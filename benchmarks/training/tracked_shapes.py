"""Whether shapes go where their prompts say: the coloured shape is tracked through generated and real clips.

    python -m benchmarks.training.tracked_shapes [--preset tiny] [--threads 1]

Needs the outputs of the preset up to `high-quality-finetuning`, over the plain worlds. The clips are those that the
stage `recognition-evaluation` judges: same prompts, sampling and seeds. The shape is where a pixel is near the prompt's
colour. A row per motion: how far the shape gets along the way that the caption names, from the first two frames to the
last two, in heights of the frame; its mean place along that way; and how many clips are right, which move by more than
0.03 within 45 degrees of it. A zoom has the logarithm of the growth of the shape's area, and is right from 0.1 on.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import track

from evaluation.recognition.kept import as_frames
from evaluation.recognition.labels import ClipShape, LabelledClip, read_labelled
from evaluation.recognition.text_to_video import clip_seed
from flows.places import Place
from svd.config import Preset
from svd.config.load import load_preset
from svd.core.device import pick_device
from svd.generation import load_models, text_to_video
from svd.media.video import Frames
from svd.synthetic.drawing import COLOURS

WAYS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
WAYS |= {"pan-left": (1, 0), "pan-right": (-1, 0)}  # a shape moves against the camera
ZOOMS = {"zoom-in": 1, "zoom-out": -1}
SPREAD, FAINT = 60.0, 0.3  # of the distance from the colour, in RGB levels; nearness that no longer counts
MOVED, GROWN = 0.03, 0.1
BATCH = 8


@dataclass(frozen=True)
class Path:
    """Where a shape is in each frame, (T, 2) in heights from the middle, and its area (T,) in pixels."""

    places: np.ndarray
    areas: np.ndarray

    @property
    def way(self) -> np.ndarray:
        """How far it gets, (2,)."""
        moved: np.ndarray = self.places[-2:].mean(0) - self.places[:2].mean(0)
        return moved

    @property
    def growth(self) -> float:
        """The logarithm of how many times as large it becomes."""
        return float(np.log(max(self.areas[-2:].mean(), 1.0) / max(self.areas[:2].mean(), 1.0)))


def find_path(frames: Frames, colour: str) -> Path:
    """Track what is of a colour through a clip (T, H, W, 3) uint8."""
    near = np.exp(-((frames - np.array(COLOURS[colour], np.float64)) ** 2).sum(-1) / (2 * SPREAD**2))
    near[near < FAINT] = 0
    height, width = near.shape[1:]
    areas = near.sum((1, 2))
    rows, columns = np.mgrid[:height, :width]
    sums = np.stack([(near * (columns + 0.5)).sum((1, 2)), (near * (rows + 0.5)).sum((1, 2))], 1)
    middle = np.array([width, height]) / 2 / height
    return Path(sums / np.maximum(areas, 1e-6)[:, None] / height - middle, areas)


def motion_of(clip: LabelledClip) -> str:
    """Return the one motion that a plain scene's caption names."""
    return clip.labels["action"] if clip.labels["camera"] == "object-motion" else clip.labels["camera"]


def generate(preset: Preset, clips: Sequence[LabelledClip]) -> list[Frames]:
    """Generate a clip of each caption, as `recognition-evaluation` does."""
    place, config = Place(preset.name, "recognition-evaluation"), preset.evaluation.recognition
    inputs, phase = place.inputs, preset.high_quality_finetuning.phases[-1]
    networks = (inputs["autoencoder"], inputs["encoders"], preset.encoders, pick_device())
    models = load_models(inputs["high-quality-finetuning"] / "unet", *networks)
    found: list[Frames] = []
    for first in track(range(0, len(clips), BATCH), "generating"):
        made = text_to_video(
            models,
            [clip.caption for clip in clips[first : first + BATCH]],
            frames=phase.frames,
            height=phase.height,
            width=phase.width,
            fps=config.fps,
            motion_bucket=config.motion_bucket,
            sampling=config.sampling,
            seed=[clip_seed(preset.seed, number) for number in range(first, min(first + BATCH, len(clips)))],
            progress=False,
        )
        found += as_frames(made)
    return found


def rows_of(clips: Sequence[LabelledClip], frames: Sequence[Frames]) -> dict[str, list[tuple[float, float, bool]]]:
    """Return for each motion of its clips: how far along, the mean place along, right."""
    found: dict[str, list[tuple[float, float, bool]]] = defaultdict(list)
    for clip, film in zip(clips, frames, strict=True):
        motion, path = motion_of(clip), find_path(film, clip.labels["colour"])
        if motion in WAYS:
            way = np.array(WAYS[motion])
            along, length = float(path.way @ way), float(np.hypot(*path.way))
            right = along > MOVED and along > length * np.cos(np.pi / 4)
            found[motion].append((along, float(path.places.mean(0) @ way), right))
        elif motion in ZOOMS:
            found[motion].append((path.growth, 0.0, path.growth * ZOOMS[motion] > GROWN))
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--threads", type=int, default=1, help="generated clips depend on it a little")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    preset = load_preset(options.preset)
    config, phase = preset.evaluation.recognition, preset.high_quality_finetuning.phases[-1]
    shape = ClipShape(phase.frames, config.fps, phase.height, phase.width)
    clips = read_labelled(Place(preset.name, "sources").output, "test", config.prompts, shape)
    for name, frames in (("real", [clip.frames for clip in clips]), ("generated", generate(preset, clips))):
        print(f"\n| {name} | clips | along the way | mean place along it | right |\n|---|---|---|---|---|")
        for motion, found in sorted(rows_of(clips, frames).items()):
            along, place, right = (np.array(column, float) for column in zip(*found, strict=True))
            print(f"| {motion} | {len(found)} | {along.mean():+.3f} | {place.mean():+.3f} | {right.sum():.0f} |")


if __name__ == "__main__":
    main()
