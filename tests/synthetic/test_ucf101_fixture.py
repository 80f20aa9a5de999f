"""The stand-in for UCF-101 has its layout and shows what its class names say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from svd.config import SyntheticWorlds
from svd.media.video import read_frames
from svd.synthetic.scenes import ACTIONS, CAMERAS, World, combinations
from svd.synthetic.ucf101_fixture import CLASSES, fixture_classes, identifier, write_ucf101_fixture

CONFIG = SyntheticWorlds(height=24, ucf101_clips_per_class=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fixture")
    assert write_ucf101_fixture(target, CONFIG, 3) == 2 * CLASSES
    return target


def test_layout_and_lists(folder: Path) -> None:
    index = dict(line.split()[::-1] for line in (folder / "ucfTrainTestlist/classInd.txt").read_text().splitlines())
    assert len(index) == CLASSES and sorted(index) == list(index)
    train = [line.split() for line in (folder / "ucfTrainTestlist/trainlist01.txt").read_text().splitlines()]
    test = (folder / "ucfTrainTestlist/testlist01.txt").read_text().splitlines()
    assert {line[1] for line in train} <= set(index.values())
    assert all(index[file.split("/")[0]] == label for file, label in train)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.avi")}
    assert {file for file, _ in train} | set(test) == files and not {file for file, _ in train} & set(test)
    assert 0.15 < len(test) / len(files) < 0.35
    for file in files:
        label, group = re.fullmatch(r"(\w+)/v_\1_g(\d\d)_c\d\d\.avi", file).groups()  # type: ignore[union-attr]
        assert label in index and (int(group) <= 7) == (file in test)


def test_clips_are_ucf_like_and_differ_within_a_class(folder: Path) -> None:
    label = next(p for p in sorted(folder.iterdir()) if p.is_dir())
    (a, fps), (b, _) = (read_frames(path) for path in sorted(label.glob("*.avi")))
    assert fps == 25 and a.shape == (48, 24, 32, 3)
    assert np.abs(a.astype(int) - b).mean() > 3


def test_classes_are_distinct_held_out_and_cover_the_vocabulary() -> None:
    classes = fixture_classes(3)
    assert len(classes) == CLASSES
    assert {scene.action for scene in classes.values()} == set(ACTIONS)
    assert {scene.camera for scene in classes.values()} == set(CAMERAS)
    assert {scene.thing for scene in classes.values()} <= set(combinations("test")[0])


def test_classes_of_the_plain_world_are_held_out_too() -> None:
    classes = fixture_classes(3, "plain")
    assert len(classes) == CLASSES and all(identifier(scene.caption) == name for name, scene in classes.items())
    trained = {identifier(World(3, "train", "plain").scene(index).caption) for index in range(3000)}
    assert len(trained) == 432 and not trained & classes.keys()


def test_prompts_are_captions_and_labelled(folder: Path) -> None:
    prompts = json.loads((folder / "prompts.json").read_text())
    assert prompts["dataset"] == "ucf101_fixture" and "synthetic" in prompts["note"]
    assert all(identifier(caption) == name for name, caption in prompts["prompts"].items())
    assert identifier("an orange ring moving up over blue dots, the camera pans left") == (
        "OrangeRingMovingUpOverBlueDotsTheCameraPansLeft"
    )
