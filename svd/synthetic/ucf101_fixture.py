"""A synthetic stand-in for UCF-101 in its layout: class folders, `v_<Class>_gXX_cYY.avi`, split files.

It exists so that the whole evaluation protocol (§4.1.1, App. E.4) runs without the data set, and is called
`ucf101_fixture` everywhere. A class is one scene of the test world: object, background, action and camera are fixed;
size, speed, place and texture seeds differ from clip to clip. UCF-101's names of human actions would tell a model that
has only seen synthetic worlds nothing, so the class identifiers are the classes' captions in UCF-101's spelling
(`RedRingMovingLeftOverGreenChecksTheCameraIsStatic`), which the protocol uses as prompts like the real identifiers.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from svd.config import SyntheticWorlds
from svd.core.files import write_json, write_text
from svd.synthetic.encode import XVID, encode_video
from svd.synthetic.scenes import ACTIONS, CAMERAS, Scene, Style, World, render_scene

CLASSES = 101
FPS = 25  # as UCF-101
FRAMES = 48
_FIRST_SCENE = 10_000_000  # scenes of the test world that no video uses
_TEST_GROUPS = 7  # UCF-101's groups 1 to 7 are the first test split, 8 to 25 the training split


def identifier(caption: str) -> str:
    """Spell a caption as UCF-101 its class names: in CamelCase, without the first article and punctuation."""
    words = re.findall(r"[a-z]+", caption.lower())
    return "".join(word.capitalize() for word in words[1:])


def fixture_classes(seed: int, style: Style = "textured") -> dict[str, Scene]:
    """Draw the 101 classes by identifier: every action in turn, every camera motion, no two alike.

    The plain world has 144 scenes that differ in words; its classes are the first 101 that it draws.
    """
    world = World(seed, "test", style)
    if style == "plain":
        drawn: dict[str, Scene] = {}
        for index in itertools.count(_FIRST_SCENE):
            scene = world.scene(index)
            drawn.setdefault(identifier(scene.caption), scene)
            if len(drawn) == CLASSES:
                break
        return dict(sorted(drawn.items()))
    cameras = list(CAMERAS)
    classes: dict[str, Scene] = {}
    index = _FIRST_SCENE
    while len(classes) < CLASSES:
        number = len(classes)
        action = ACTIONS[number % len(ACTIONS)]
        camera = "static" if number % 2 else cameras[number // 2 % len(cameras)]
        if action == "standing still" and camera == "static":
            camera = cameras[1 + number % (len(cameras) - 1)]
        scene = replace(world.scene(index), action=action, camera=camera)
        index += 1
        plain_spin = action == "spinning" and scene.thing.texture == "plain"
        if not plain_spin:
            classes.setdefault(identifier(scene.caption), scene)
    return dict(sorted(classes.items()))


def _variant(scene: Scene, seed: int, label: int, number: int) -> Scene:
    """Return the scene of another clip of the same class."""
    key = (seed, 2, label, number)
    generator = np.random.default_rng(key)
    return replace(
        scene,
        seed=key,
        size=float(generator.uniform(0.38, 0.52)),
        speed=float(generator.uniform(0.8, 1.25)),
        camera_speed=float(generator.uniform(0.8, 1.25)),
        start=(float(generator.uniform(-0.3, 0.3)), float(generator.uniform(-0.15, 0.15))),
    )


def _group_and_clip(label: int, number: int) -> tuple[int, int]:
    """Return group and clip number; about every fourth clip is in a group of the test split, as in UCF-101."""
    position = label + number
    if position % 4 == 0:
        return 1 + number // 4 % _TEST_GROUPS, 1 + number // 4 // _TEST_GROUPS
    groups = 25 - _TEST_GROUPS
    return 1 + _TEST_GROUPS + number % groups, 1 + number // groups


def write_ucf101_fixture(folder: Path, config: SyntheticWorlds, seed: int) -> int:
    """Write the fixture (4:3 clips of 48 frames at 25 fps, split files, `prompts.json`); returns the number of clips.

    `prompts.json` holds the synthetic caption of each class; the paper's protocol prompts with raw class identifiers.
    """
    classes = fixture_classes(seed, config.style)
    height, width = config.height, round(config.height * 4 / 3 / 2) * 2
    lists: dict[str, list[str]] = {"trainlist01": [], "testlist01": []}
    labels = list(enumerate(classes.items(), 1))
    for label, (name, scene) in track(labels, "ucf101 fixture", console=Console(stderr=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(config.ucf101_clips_per_class):
            group, clip = _group_and_clip(label, number)
            path = folder / name / f"v_{name}_g{group:02d}_c{clip:02d}.avi"
            train = group > _TEST_GROUPS
            line = f"{name}/{path.name}"
            lists["trainlist01" if train else "testlist01"].append(f"{line} {label}" if train else line)
            if not path.exists():
                frames = render_scene(_variant(scene, seed, label, number), FRAMES, height, width, FPS)
                encode_video(path, frames, FPS, XVID)
    splits = folder / "ucfTrainTestlist"
    lists["classInd"] = [f"{label} {name}" for label, (name, _) in labels]
    for file, lines in lists.items():
        write_text(splits / f"{file}.txt", "".join(f"{line}\n" for line in lines))
    write_json(
        folder / "prompts.json",
        {
            "dataset": "ucf101_fixture",
            "note": "synthetic captions of the fixture's classes; the paper's protocol uses raw class identifiers",
            "prompts": {name: scene.caption for name, scene in classes.items()},
        },
    )
    return CLASSES * config.ucf101_clips_per_class
