"""Recognition: labels are the scenes', the judge reads pixels, and a model that ignores its prompt is found out."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TINY, WIDTH, write_models
from torch import Tensor

from evaluation.claims import read_claims
from evaluation.recognition import text_to_video as stage
from evaluation.recognition.camera import camera_motion, mean_flow
from evaluation.recognition.classifier import ClipClassifier, train_classifier
from evaluation.recognition.kept import as_clips, kept_clips
from evaluation.recognition.labels import ClipShape, LabelledClip, read_labelled
from svd.config import SyntheticWorlds
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.core.files import write_json
from svd.stage import StageContext
from svd.synthetic.scenes import World, render_clip
from svd.synthetic.videos import write_worlds

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220)}
SHAPE = ClipShape(4, 8, 32, 48)


def drawn(colour: str, shape: str, action: str, draw: np.random.Generator) -> LabelledClip:
    """A bar, upright or lying, of a colour, that moves left or right over a noisy ground."""
    frames = draw.integers(90, 130, (4, 32, 48, 3)).astype(np.uint8)
    height, width = (18, 6) if shape == "upright" else (6, 18)
    top, left = draw.integers(2, 32 - height), draw.integers(12, 48 - width - 12)
    for t in range(4):
        x = left + (t - 1) * (3 if action == "moving right" else -3)
        frames[t, top : top + height, x : x + width] = COLOURS[colour]
    labels = {"colour": colour, "shape": shape, "action": action, "camera": "object-motion"}
    return LabelledClip(frames, f"a {colour} {shape} bar {action}", labels)


def drawn_clips(count: int, seed: int) -> list[LabelledClip]:
    draw = np.random.default_rng(seed)
    kinds = [(c, s, a) for c in COLOURS for s in ("upright", "lying") for a in ("moving left", "moving right")]
    return [drawn(*kinds[i % len(kinds)], draw) for i in range(count)]


@pytest.fixture(scope="module")
def judge() -> ClipClassifier:
    return train_classifier(drawn_clips(160, 0), steps=60, seed=0)


def accuracy(judge: ClipClassifier, frames: Sequence[np.ndarray], clips: Sequence[LabelledClip]) -> dict[str, float]:
    answers = judge.answers(frames)
    return {n: float(np.mean([a == c.labels[n] for a, c in zip(answers[n], clips, strict=True)])) for n in answers}


def test_the_judge_is_right_on_clips_that_it_has_not_seen(judge: ClipClassifier) -> None:
    clips = drawn_clips(64, 1)
    assert min(accuracy(judge, [clip.frames for clip in clips], clips).values()) >= 0.9


@pytest.mark.parametrize(
    "damage, lost",
    [
        (lambda frames: np.repeat(frames.mean(-1, keepdims=True), 3, -1).astype(np.uint8), {"colour"}),
        (lambda frames: frames[::-1].copy(), {"action"}),
        (lambda frames: np.full_like(frames, 110), {"colour", "shape", "action"}),
    ],
    ids=["grey", "reversed", "empty"],
)
def test_without_the_cue_the_judge_is_not_right(judge: ClipClassifier, damage: Any, lost: set[str]) -> None:
    """It reads what it is asked, not something that goes along with it."""
    clips = drawn_clips(64, 2)
    found = accuracy(judge, [damage(clip.frames) for clip in clips], clips)
    assert all(found[name] <= 0.65 for name in lost), found


def test_equal_seeds_give_equal_judges() -> None:
    one, again, other = (train_classifier(drawn_clips(32, 0), steps=2, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert not torch.equal(one["heads.colour.weight"], other["heads.colour.weight"])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    worlds = SyntheticWorlds(train_videos=2, test_videos=2, scenes_per_video=6, height=32, width=48)
    write_worlds(folder, worlds, 0)
    return folder


def test_labels_are_those_of_the_scenes(sources: Path) -> None:
    truth = json.loads((sources / "truth.json").read_text())
    scenes = {s["caption"]: s for name in truth if name.startswith("test/") for s in truth[name]["scenes"]}
    clips = read_labelled(sources, "test", 100, SHAPE)
    clear = [s for s in scenes.values() if not (s["blur"] or s["text"])]
    assert {clip.caption for clip in clips} == {s["caption"] for s in clear} and len(clips) == len(clear) < len(scenes)
    for clip in clips:
        assert clip.frames.shape == (4, 32, 48, 3) and clip.frames.dtype == np.uint8
        assert all(clip.labels[name] == scenes[clip.caption][name] for name in clip.labels)
    twice = read_labelled(sources, "test", 3, SHAPE, windows=2)
    assert len(twice) == 6 and twice[0].caption == twice[1].caption
    assert not np.array_equal(twice[0].frames, twice[1].frames)
    with pytest.raises(UserError, match="no train scene holds 400 frames"):
        read_labelled(sources, "train", 5, ClipShape(400, 8, 32, 48))


def test_the_camera_of_short_clips_is_named() -> None:
    """Eight frames at 8 fps, as models make them: nearly as good as curation on whole shots."""
    clips = [render_clip(World(0, "test"), index, 8, 64, 96, 8) for index in range(40)]
    right = [camera_motion(clip.frames, 8).label == clip.scene.camera_label for clip in clips]
    assert np.mean(right) >= 0.9
    still = np.repeat(clips[0].frames[:1], 8, 0)
    assert camera_motion(still, 8).label == "static" and mean_flow(still, 8) < 0.01 < mean_flow(clips[0].frames, 8)


def context(folder: Path, sources: Path, output: str = "output", **options: Any) -> StageContext:
    """A run on random models."""
    if not (folder / "hq").exists():
        write_models(folder)
        shutil.copytree(folder / "hq", folder / "video")
    small = {"prompts": 6, "training_clips": 8, "training_steps": 2}
    values = {f"evaluation.recognition.{name}": value for name, value in {**small, **options}.items()}
    phase = load_preset(TINY).video_pretraining.phases[-1].model_copy(update={"frames": 4, "height": 32, "width": 48})
    sections = ("image_pretraining", "video_pretraining", "high_quality_finetuning", "image_to_video", "camera_lora")
    sampling: dict[str, Any] = {f"{name}.phases": [phase.model_dump()] for name in (*sections, "frame_interpolation")}
    sampling |= {"latents.geometries": [{"frames": 4, "height": 32, "width": 48}]}
    sampling |= {"evaluation.recognition.sampling.steps": 1, "encoders.toy_width": WIDTH}
    names = {"high-quality-finetuning": "hq", "video-pretraining": "video"}
    inputs = {"sources": sources} | {k: folder / names.get(k, k) for k in (*names, "autoencoder", "encoders")}
    work = folder / "work" / output
    work.mkdir(parents=True, exist_ok=True)
    return StageContext(load_preset(TINY, {**values, **sampling}), inputs, folder / output, work)


def test_the_stage_end_to_end_and_killed(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = stage.run(context(tmp_path, sources))
    with (tmp_path / "output" / "recognition.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    subjects = ["generated", "video pretraining", "untrained", "noise", "mean frame", "autoencoder", "real"]
    assert [row["subject"] for row in rows[::4]] == subjects and len(rows) == 4 * len(subjects)
    assert all(0 <= float(r["low"]) <= float(r["share"]) <= float(r["high"]) <= 1 for r in rows)
    assert report.metrics["camera_real"] > 0.5 > report.metrics["camera_noise"]
    protocol = json.loads((tmp_path / "output" / "protocol.json").read_text())
    assert protocol["digest"] == report.metrics["protocol"] == rows[0]["protocol"]
    claims = read_claims(tmp_path / "output")
    assert len(claims) == 6 and not any(claim.shown for claim in claims if "colour" in claim.text)
    assert "not shown" in (tmp_path / "output" / "claims.md").read_text()
    calls: list[int] = []
    made = stage.text_to_video
    monkeypatch.setattr(stage, "text_to_video", lambda *a, **o: calls.append(len(a[1])) or made(*a, **o))
    stage.run(context(tmp_path, sources))
    assert calls == [], "finished clips are not made again"
    stage.run(context(tmp_path, sources, fps=12))
    assert calls == [6, 6, 6], "another protocol is another folder"


def test_without_worlds_there_is_nothing_to_recognise(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    report = stage.run(context(tmp_path, tmp_path / "sources"))
    assert report.metrics == {"prompts": 0} and "nothing to recognise" in report.summary


def recognised(monkeypatch: pytest.MonkeyPatch, judge: ClipClassifier, make: Any, work: Path) -> dict[str, bool]:
    """The verdicts on a model that answers the prompts of drawn clips by `make(prompt index)`."""
    prompts = drawn_clips(48, 5)
    found = stage.Recognition(load_preset(TINY).evaluation.recognition, SHAPE, 0, prompts, judge, "protocol", work)

    def model(models: Any, captions: Sequence[str], **options: Any) -> Tensor:
        texts = [clip.caption for clip in prompts]
        return as_clips([make(texts.index(caption)) for caption in captions])

    monkeypatch.setattr(stage, "text_to_video", model)
    generated = stage._generated(found, "generated", None, 1.0)  # type: ignore[arg-type]
    noise = list(stage._noise(0, (48, 4, 32, 48, 3)))
    answers = {name: found.answers(c) for name, c in (("generated", generated), ("untrained", noise))}
    answers["video pretraining"] = answers["untrained"]
    return {claim.text: claim.shown for claim in stage.claims_of(found, answers)}


def test_a_model_that_follows_its_prompts_is_seen_to_do_so(
    monkeypatch: pytest.MonkeyPatch, judge: ClipClassifier, tmp_path: Path
) -> None:
    fresh = drawn_clips(48, 6)  # the same order of kinds: other places and grounds
    verdicts = recognised(monkeypatch, judge, lambda index: fresh[index].frames, tmp_path)
    assert all(shown for text, shown in verdicts.items() if "camera" not in text), verdicts


@pytest.mark.parametrize(
    "fault, lost",
    [("the prompt is cut", ("colour", "shape", "object motion")), ("time is reversed", ("object motion",)),
     ("colours are cut", ("colour",)), ("nothing but noise", ("colour", "shape", "object motion", "clips follow"))],
)  # fmt: skip
def test_planted_faults_are_found(
    fault: str, lost: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, judge: ClipClassifier, tmp_path: Path
) -> None:
    fresh, draw = drawn_clips(48, 6), np.random.default_rng(7)
    order = draw.permutation(48)

    def made(index: int) -> np.ndarray:
        frames = fresh[int(order[index]) if fault == "the prompt is cut" else index].frames
        if fault == "time is reversed":
            return frames[::-1].copy()
        if fault == "colours are cut":
            return np.repeat(frames.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
        return draw.integers(0, 256, frames.shape).astype(np.uint8) if fault == "nothing but noise" else frames

    verdicts = recognised(monkeypatch, judge, made, tmp_path)
    for what in lost:
        assert not next(shown for text, shown in verdicts.items() if what in text), (what, verdicts)


def test_kept_clips_are_made_once(tmp_path: Path) -> None:
    asked: list[int] = []

    def make(numbers: Sequence[int]) -> Tensor:
        asked.extend(numbers)
        return torch.stack([torch.full((2, 3, 4, 4), number / 255) for number in numbers])

    kept_clips(tmp_path, 3, make)
    clips = kept_clips(tmp_path, 10, make)
    assert asked == list(range(10)) and [int(clip[0, 0, 0, 0]) for clip in clips] == list(range(10))


def test_a_damaged_list_of_claims_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "claims.json", [{"text": "only"}])
    with pytest.raises(UserError, match=r"claims\.json: damaged"):
        read_claims(tmp_path)
