"""Clips made comparable (App. E.3): the same length and size, watermarks masked in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluation.frechet.protocol import Crop, Resize, crop, resize
from svd.core.errors import UserError
from svd.media.video import Frames, read_frames, write_mp4

CLIP_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")


@dataclass(frozen=True)
class Box:
    """A region in fractions of height and width, such as Pika's watermark in the lower right corner.

    Raises UserError for a region that isn't inside the image.
    """

    top: float
    left: float
    bottom: float
    right: float

    def __post_init__(self) -> None:
        if not (0 <= self.top < self.bottom <= 1 and 0 <= self.left < self.right <= 1):
            raise UserError(f"watermark {self.top:g},{self.left:g},{self.bottom:g},{self.right:g}: not in the picture")


@dataclass(frozen=True)
class ModelClips:
    """The clips of one model in a folder, `<prompt id>.mp4`, and the watermarks on them."""

    model: str
    folder: Path
    watermarks: tuple[Box, ...] = ()


def cover_and_crop(frames: Frames, height: int, width: int) -> Frames:
    """Scale frames (T, H, W, 3) to cover (height, width), antialiased, and crop the centre.

    Gen-2's 1408×768 becomes 1056×576 and then 1024×576, as in the paper.
    """
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float()
    covered = resize(pixels, Resize(height, width, antialias=True, cover=True))
    cut = crop(covered, Crop(height, width)).clamp(0, 255).round().to(torch.uint8)
    return cut[0].permute(0, 2, 3, 1).contiguous().numpy()


def mask(frames: Frames, boxes: Sequence[Box]) -> Frames:
    """Return the frames with `boxes` in black."""
    masked = frames.copy()
    height, width = frames.shape[1:3]
    for box in boxes:
        rows = slice(int(np.floor(box.top * height)), int(np.ceil(box.bottom * height)))
        columns = slice(int(np.floor(box.left * width)), int(np.ceil(box.right * width)))
        masked[:, rows, columns] = 0
    return masked


def trim(frames: Frames, fps: float, seconds: float) -> Frames:
    """Return the first `seconds` of a clip, at least one frame."""
    return frames[: max(1, round(seconds * fps))]


def harmonise(clips: Mapping[str, tuple[Frames, float]], boxes: Sequence[Box]) -> dict[str, tuple[Frames, float]]:
    """Make the clips (frames, fps) of one prompt, by model, comparable.

    All get the length of the shortest, the size of the one with the fewest pixels, and the masks of all. Sides are
    even, so that browsers can play them. Frame rates stay as they are.
    """
    seconds = min(len(frames) / fps for frames, fps in clips.values())
    height, width = min((frames.shape[1:3] for frames, _ in clips.values()), key=lambda size: size[0] * size[1])
    height, width = height // 2 * 2, width // 2 * 2
    return {
        model: (mask(cover_and_crop(trim(frames, fps, seconds), height, width), boxes), fps)
        for model, (frames, fps) in clips.items()
    }


def spoil(frames: Frames, seed: int) -> Frames:
    """Make the wrong answer of an attention check: the clip under noise, its frames shuffled."""
    rng = np.random.default_rng(seed)
    noisy = frames[rng.permutation(len(frames))].astype(np.float32) * 0.3 + rng.normal(90, 70, frames.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def prepare_clips(sources: Sequence[ModelClips], prompts: Mapping[str, str], folder: Path) -> None:
    """Write the harmonised clips `<folder>/<prompt id>/<number of the model>.mp4` and the checks' `…-spoiled.mp4`.

    Names of files don't hold the model, so that raters can't read it in the page. Finished files are kept. Raises
    UserError for missing clips.
    """
    boxes = [box for source in sources for box in source.watermarks]
    for number, key in enumerate(prompts):
        targets = [folder / key / f"{i}.mp4" for i in range(len(sources))]
        spoiled = [folder / key / f"{i}-spoiled.mp4" for i in range(len(sources))]
        if all(path.is_file() for path in (*targets, *spoiled)):
            continue
        clips = {source.model: read_frames(_clip(source, key)) for source in sources}
        made = harmonise(clips, boxes)
        for source, target, wrong in zip(sources, targets, spoiled, strict=True):
            frames, fps = made[source.model]
            write_mp4(target, frames, fps)
            write_mp4(wrong, spoil(frames, number), fps)


def _clip(source: ModelClips, key: str) -> Path:
    """Return the clip of a prompt; other files of that name, such as metadata in JSON, are ignored."""
    found = [path for suffix in CLIP_SUFFIXES if (path := source.folder / f"{key}{suffix}").is_file()]
    if not found:
        raise UserError(
            f"{source.folder / key}.mp4: no clip of this prompt by {source.model}; make it or drop the prompt"
        )
    return found[0]
