"""Synthetic videos whose every cut, motion, caption and defect is known: scenes of a world, edited together.

`write_worlds` writes `train/` and `test/`: H.264 videos, beside each `<name>.json` with the captions that a publisher
of the video would give (some planted wrong), and one `truth.json` with the truth of each video by its path.
All frame intervals are half open. A cut of kind "hard" has start_frame == end_frame == the first frame of the new
scene; a scene's interval leaves transitions out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track

from svd.config import SyntheticWorlds
from svd.core.files import write_json
from svd.synthetic.encode import Encoding, encode_video
from svd.synthetic.scenes import Scene, Split, World, render_scene, still

Kind = Literal["hard", "fade", "dissolve"]
Frame = NDArray[np.uint8]

_KINDS: tuple[Kind, ...] = ("hard", "fade", "dissolve")
_VIDEO_SCENES = 1_000_000  # scenes below this index are left to single clips
# Every 20 shots hold exactly these planted defects, in random order.
_DEFECTS = ("static", "static", "text", "text", "wrong caption", "wrong caption", "blur") + ("",) * 13
_HEADLINES = ("BREAKING NEWS", "SUBSCRIBE NOW", "LIVE AT NINE", "WEATHER REPORT", "CITY MARATHON", "FINAL SCORE")
_SUBLINES = ("Channel 7 studio", "www.example.org", "Part two of four", "Reporting from home", "Jane Doe, editor")


@dataclass(frozen=True)
class Transition:
    """The change from one shot to the next, in frames [start_frame, end_frame)."""

    kind: Kind
    start_frame: int
    end_frame: int


@dataclass(frozen=True)
class Shot:
    """A scene in a video; its frames [first, last) show it, those in [start_frame, end_frame) show nothing else."""

    scene: Scene
    caption: str
    defect: str
    text: tuple[str, str]
    first: int
    last: int
    start_frame: int
    end_frame: int


@dataclass(frozen=True)
class VideoPlan:
    """Everything that defines a video before a pixel is drawn."""

    shots: tuple[Shot, ...]
    transitions: tuple[Transition, ...]
    height: int
    width: int
    fps: int
    b_frames: int

    @property
    def frames(self) -> int:
        """The length of the video in frames."""
        return self.shots[-1].last


def _defect(world: World, shot: int) -> str:
    order = np.random.default_rng(world.key(shot // len(_DEFECTS), 2)).permutation(len(_DEFECTS))
    return _DEFECTS[order[shot % len(_DEFECTS)]]


def _scene_unlike(world: World, index: int, previous: Scene | None) -> Scene:
    """Draw a scene whose background differs in colour from the shot before, so that the cut is visible."""
    for attempt in range(100):
        scene = world.scene(_VIDEO_SCENES + index * 100 + attempt)
        if previous is None or scene.background_colour != previous.background_colour:
            return scene
    raise RuntimeError(f"world {world.split} has only one background colour")


def _wrong_caption(world: World, index: int, scene: Scene) -> str:
    """Return the caption of a scene with another object, colour, action, camera and background than this one."""
    for attempt in range(1000):
        other = world.scene(2 * _VIDEO_SCENES + index * 1000 + attempt)
        pairs = (
            (other.thing.shape, scene.thing.shape),
            (other.thing.colour, scene.thing.colour),
            (other.action, scene.action),
            (other.camera, scene.camera),
            (other.background, scene.background),
            (other.background_colour, scene.background_colour),
        )
        if all(a != b for a, b in pairs):
            return other.caption
    raise RuntimeError(f"no scene of world {world.split} differs from {scene.caption!r} in everything")


def plan_video(world: World, index: int, scenes: int, height: int, width: int, fps: int) -> VideoPlan:
    """Plan video `index` of a world: `scenes` shots of 1.2 to 2 s outside their transitions."""
    generator = np.random.default_rng(world.key(index, 3))
    kinds = [_KINDS[generator.choice(3, p=(0.6, 0.2, 0.2))] for _ in range(scenes - 1)]
    shots: list[Shot] = []
    transitions: list[Transition] = []
    previous: Scene | None = None
    clock = 0  # the first frame after the transition into this shot
    first = 0
    for i in range(scenes):
        number = index * scenes + i
        scene = _scene_unlike(world, number, previous)
        previous = scene
        defect = _defect(world, number)
        if defect == "static":
            scene = still(scene)
        caption = _wrong_caption(world, number, scene) if defect == "wrong caption" else scene.caption
        text = (str(generator.choice(_HEADLINES)), str(generator.choice(_SUBLINES)))
        end = clock + round(generator.uniform(1.2, 2.0) * fps)
        kind = kinds[i] if i < scenes - 1 else "hard"
        span = 0 if kind == "hard" else 2 * round(generator.uniform(0.2, 0.45) * fps)
        last = end + (span // 2 if kind == "fade" else span)
        shots.append(Shot(scene, caption, defect, text, first, last, clock, end))
        if i < scenes - 1:
            transitions.append(Transition(kind, end, end + span))
        first, clock = (end if kind == "dissolve" else last), end + span
    return VideoPlan(tuple(shots), tuple(transitions), height, width, fps, b_frames=2 * (index % 2))


def _overlay(height: int, width: int, text: tuple[str, str]) -> Image.Image:
    """Draw a lower third, a dark bar with a headline and a line below, RGBA."""
    image = Image.new("RGBA", (width, height))
    draw = ImageDraw.Draw(image)
    top = round(height * 0.62)
    draw.rectangle((0, top, width, round(height * 0.96)), fill=(12, 18, 40, 225))
    for line, share, offset, colour in ((text[0], 0.17, 0.02, (255, 255, 255)), (text[1], 0.13, 0.19, (255, 214, 64))):
        size = height * share
        while draw.textlength(line, font=ImageFont.load_default(size)) > 0.94 * width:
            size *= 0.95
        draw.text((0.03 * width, top + offset * height), line, font=ImageFont.load_default(size), fill=colour)
    return image


def _render_shot(shot: Shot, plan: VideoPlan) -> NDArray[np.uint8]:
    frames = render_scene(shot.scene, shot.last - shot.first, plan.height, plan.width, plan.fps)
    if shot.defect == "blur":
        sigma = 0.025 * plan.height
        frames = np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in frames])
    if shot.defect == "text":
        overlay = np.asarray(_overlay(plan.height, plan.width, shot.text), np.float32)
        alpha = overlay[..., 3:] / 255
        frames = np.round(frames * (1 - alpha) + overlay[..., :3] * alpha).astype(np.uint8)
    return frames


def _weights(transition: Transition, frame: int) -> tuple[float, float]:
    """Return the weights of the old and the new shot in a frame of a gradual transition."""
    length = transition.end_frame - transition.start_frame
    done = (frame - transition.start_frame + 1) / (length + 1)
    if transition.kind == "dissolve":
        return 1 - done, done
    return max(0.0, 1 - 2 * done), max(0.0, 2 * done - 1)


def render_video(plan: VideoPlan) -> Iterator[Frame]:
    """Draw a planned video, frame by frame, (H, W, 3) uint8 RGB."""
    tail: NDArray[np.uint8] = np.zeros((0, plan.height, plan.width, 3), np.uint8)
    for i, shot in enumerate(plan.shots):
        frames = _render_shot(shot, plan)
        if i and plan.transitions[i - 1].kind != "hard":
            yield from _mixed(plan.transitions[i - 1], plan.shots[i - 1], shot, tail, frames)
        yield from frames[shot.start_frame - shot.first : shot.end_frame - shot.first]
        tail = frames[shot.end_frame - shot.first :]


def _mixed(
    transition: Transition, old: Shot, new: Shot, tail: NDArray[np.uint8], frames: NDArray[np.uint8]
) -> Iterator[Frame]:
    """Yield the frames of a gradual transition; `tail` holds the old shot's frames from its end_frame on."""
    for frame in range(transition.start_frame, transition.end_frame):
        keep, take = _weights(transition, frame)
        mixed = np.zeros(frames.shape[1:], np.float32)
        if frame < old.last:
            mixed += keep * tail[frame - old.end_frame]
        if frame >= new.first:
            mixed += take * frames[frame - new.first]
        yield np.round(mixed).astype(np.uint8)


def _truth(plan: VideoPlan) -> dict[str, Any]:
    return {
        "fps": plan.fps,
        "frames": plan.frames,
        "height": plan.height,
        "width": plan.width,
        "cuts": [asdict(t) for t in plan.transitions],
        "scenes": [scene_truth(shot) for shot in plan.shots],
    }


def scene_truth(shot: Shot) -> dict[str, Any]:
    """Return the truth about a shot; camera uses the labels of the clip catalogue."""
    scene = shot.scene
    return {
        "start_frame": shot.start_frame,
        "end_frame": shot.end_frame,
        "caption": scene.caption,
        "sidecar_caption": shot.caption,
        "shape": scene.thing.shape,
        "colour": scene.thing.colour,
        "texture": scene.thing.texture,
        "background": scene.background,
        "background_colour": scene.background_colour,
        "action": scene.action,
        "camera": scene.camera_label,
        **{name.replace(" ", "_"): shot.defect == name for name in sorted(set(_DEFECTS) - {""})},
        "words": list(shot.text) if shot.defect == "text" else [],
    }


def _sidecar(plan: VideoPlan) -> dict[str, Any]:
    """Return what a publisher would state about the video: captions with their times, some of them wrong."""
    return {
        "licence": "CC0-1.0",
        "origin": "svd.data.synthetic",
        "scenes": [
            {
                "start": shot.first / plan.fps,
                "end": shot.last / plan.fps,
                "caption": shot.caption,
            }
            for shot in plan.shots
        ],
    }


def write_worlds(folder: Path, config: SyntheticWorlds, seed: int) -> dict[str, int]:
    """Write the videos of both worlds into `folder`/train and `folder`/test; return the frames of each split.

    Finished videos are not made again.
    """
    counts: dict[str, int] = {}
    truth: dict[str, Any] = {}
    splits: tuple[tuple[Split, int], ...] = (("train", config.train_videos), ("test", config.test_videos))
    for split, videos in splits:
        world, target = World(seed, split, config.style), folder / split
        target.mkdir(parents=True, exist_ok=True)
        counts[split] = 0
        for index in track(range(videos), f"synthetic {split} videos", console=Console(stderr=True)):
            plan = plan_video(world, index, config.scenes_per_video, config.height, config.width, config.fps)
            path = target / f"{split}_{index:04d}.mp4"
            truth[f"{split}/{path.name}"] = _truth(plan)
            counts[split] += plan.frames
            write_json(path.with_suffix(".json"), _sidecar(plan))
            if not path.exists():
                encode_video(path, render_video(plan), plan.fps, Encoding(b_frames=plan.b_frames))
    write_json(folder / "truth.json", truth)
    return counts
