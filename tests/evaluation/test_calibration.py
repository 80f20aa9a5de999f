"""Threshold calibration: subsets of the unfiltered set, models that differ in nothing else, votes, choice, resuming."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from fastapi.testclient import TestClient
from tiny_models import WIDTH, write_models
from training.curated import write_curation

from evaluation.calibration import candidates as calibration_models
from evaluation.calibration import stage as calibration
from evaluation.calibration.automatic_votes import cast_votes, nearness
from evaluation.calibration.candidates import Candidate, candidates, choose_prompts, start_set, training_subset
from evaluation.calibration.outcomes import conclude
from evaluation.preference.app import build_app
from evaluation.preference.ratings import Vote
from evaluation.preference.study import load_study, open_store
from svd.catalogue import schema, tables
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.model.formats.folders import load_unet, save_unet
from svd.model.unet import UNet, UNetConfig
from svd.stage import StageContext

FRAMES, HEIGHT, WIDTH_PX = 4, 16, 24
PHASE = {
    "iterations": 2, "batch_size": 2, "height": HEIGHT, "width": WIDTH_PX, "frames": FRAMES, "p_mean": 0.0,
    "p_std": 1.0, "learning_rate": 1e-2,
}  # fmt: skip
OVERRIDES: dict[str, Any] = {
    "encoders.toy_width": WIDTH,
    "model.unet": {
        "block_out_channels": [32, 32],
        "attention_levels": [True, False],
        "layers_per_block": 1,
        "head_channels": 16,
        "cross_attention_dim": WIDTH,
        "id_embedding_dim": 8,
    },
    "model.autoencoder.latent_channels": 4,
    "latents.windows": 1,
    "latents.min_fps": 4,
    "latents.max_fps": 12,
    "compute.training.validate_every": 2,
    "compute.training.checkpoint_every": 1,
    "compute.training.sample_steps": 1,
}
SECTION: dict[str, Any] = {
    "phases": [PHASE], "clips": 7, "axes": ["motion", "captions"], "removed": [0.0, 0.5], "prompts": 3, "votes": 1,
    "validation_samples": 4,
    "sampling": {"steps": 2, "guidance": 2.0, "solver": "ddim"},
}  # fmt: skip


def write_inputs(folder: Path) -> dict[str, Path]:
    """Eight training and four test clips, none of which the filters keep, with scores and captions; networks."""
    write_curation(folder / "curation", 8, 4, frames=FRAMES, height=HEIGHT, width=WIDTH_PX)
    path = folder / "curation" / "catalogue" / "clips.parquet"
    rows = pl.read_parquet(path)
    captions = [
        [{"captioner": "sidecar", "text": f"thing {k}"}, {"captioner": "motion", "text": "the camera is static"}][
            k % 2 :
        ]
        if k < 4
        else [{"captioner": "sidecar", "text": f"thing {k}"}]
        for k in range(len(rows))
    ]
    rows = rows.with_columns(
        motion_score=pl.Series(np.arange(len(rows), dtype=np.float32)),
        motion_bucket=pl.Series(np.arange(len(rows), dtype=np.int16)),
        source_id=pl.col("source_uri"),
        captions=pl.Series(captions),
        keep=pl.lit(False),
    )
    tables.write_table(path, tables.with_schema(rows, schema.CLIPS_SCHEMA))
    inputs = write_models(folder)
    torch.manual_seed(1)
    image = UNet(
        UNetConfig(
            block_out_channels=(32, 32), attention_levels=(True, False), layers_per_block=1, head_channels=16,
            cross_attention_dim=WIDTH, id_embedding_dim=8, ids=0, temporal=False,
        )
    )  # fmt: skip
    save_unet(image, folder / "image" / "unet")
    names = ("autoencoder", "encoders")
    return {n: inputs[n] for n in names} | {"curation": folder / "curation", "image-pretraining": folder / "image"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_inputs(tmp_path_factory.mktemp("calibration"))


def make_context(inputs: Mapping[str, Path], folder: Path, **section: Any) -> StageContext:
    values = {f"threshold_calibration.{key}": value for key, value in {**SECTION, **section}.items()}
    (folder / "work").mkdir(parents=True, exist_ok=True)
    return StageContext(load_preset("tiny", {**OVERRIDES, **values}), inputs, folder / "output", folder / "work")


@pytest.fixture(scope="module")
def automatic(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    """A calibration that has run with the automatic judge."""
    context = make_context(inputs, tmp_path_factory.mktemp("automatic"), judge="encoders")
    calibration.run(context)
    return context


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_models_differ_only_in_what_they_saw(automatic: StageContext) -> None:
    about = json.loads((automatic.output / "calibration.json").read_text())["models"]
    assert set(about) == {"unfiltered", "motion-50", "captions-sidecar", "captions-motion"}
    assert about["unfiltered"]["clips"] == 7 and about["motion-50"]["clips"] in (3, 4)
    weights = {}
    for name in about:
        weights[name] = load_unet(automatic.work / "models" / name / "phase-0" / "unet").state_dict()
    reference = weights.pop("unfiltered")
    for name, state in weights.items():
        assert any(not torch.equal(state[key], tensor) for key, tensor in reference.items()), name
    clips = {p.name for p in (automatic.output / "samples" / "unfiltered").iterdir()}
    assert clips == {f"prompt-00{k}.mp4" for k in range(3)}
    assert not (automatic.output / "models").exists()


def test_automatic_votes_are_never_shown_as_votes_of_people(automatic: StageContext) -> None:
    metrics = json.loads((automatic.output / "metrics.json").read_text())
    rated = [name for name in metrics if "_elo_" in name or "_chosen_" in name]
    assert rated and all("_automatic_" in name for name in rated)
    assert metrics["votes_open"] == 0 and "votes_people" not in metrics
    assert metrics["votes_automatic"] == 2 * 3 * 2
    for axis in ("motion", "captions"):
        assert {row["rater"] for row in read_csv(automatic.output / axis / "votes.csv")} == {"automatic"}
        assert {row["judge"] for row in read_csv(automatic.output / axis / "ratings.csv")} == {"automatic"}
        assert (automatic.output / "plots" / f"{axis}.png").stat().st_size > 1000
    assert not (automatic.output / "studies").exists()


def test_the_choice_follows_from_the_ratings(automatic: StageContext) -> None:
    chosen = json.loads((automatic.output / "chosen.json").read_text())
    assert chosen["motion"]["option"] == "min_motion" and chosen["motion"]["decided_by"] == "quality"
    assert chosen["captions"]["decided_by"] == "aggregated"
    for axis in ("motion", "captions"):
        deciding = [row for row in read_csv(automatic.output / axis / "ratings.csv") if row["decides"] == "1"]
        best = max(deciding, key=lambda row: float(row["elo"]))
        assert (best["model"], best["chosen"]) == (chosen[axis]["model"], "1")


def test_a_second_run_repeats_the_bytes_and_trains_nothing(
    automatic: StageContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = tree(automatic.output)
    lost = automatic.work / "samples" / "motion-50" / "prompt-001.mp4"
    lost.unlink()
    monkeypatch.setattr("svd.training.runner.make_trainer", lambda *_: pytest.fail("trained again"))
    made: list[int] = []
    original = calibration_models.text_to_video
    monkeypatch.setattr(
        calibration_models, "text_to_video", lambda *a, **k: made.append(len(a[1])) or original(*a, **k)
    )
    context = StageContext(automatic.preset, automatic.inputs, tmp_path / "output", automatic.work)
    calibration.run(context)
    assert made == [1]
    assert tree(context.output) == first


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_people_vote_on_a_study_and_their_votes_decide(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the stage leaves studies; then it takes their votes and trains nothing. The loser here is unfiltered."""
    context = make_context(inputs, tmp_path, judge="people", axes=["motion"])
    report = calibration.run(context)
    assert report.metrics["votes_open"] == 1 and report.metrics["votes_missing"] == 6
    assert "svd vote serve" in report.summary
    assert not list(context.output.glob("*/ratings.csv")) and not (context.output / "automatic_scores.csv").exists()
    store = open_store(context.output / "studies" / "motion")
    while question := store.next_question("ann"):
        side = question.check or ("left" if question.left == "motion-50" else "right")
        store.answer(question.number, "ann", side, 900)
    store.engine.dispose()
    again = StageContext(context.preset, inputs, context.output, tmp_path / "other-work")
    again.work.mkdir()
    monkeypatch.setattr(calibration, "make_models", lambda *_: pytest.fail("trained again"))
    report = calibration.run(again)
    assert report.metrics["votes_open"] == 0 and report.metrics["votes_people"] == 6
    assert report.metrics["motion_chosen_removed"] == 0.5
    assert report.metrics["motion_elo_quality_50"] > 1000 > report.metrics["motion_elo_quality_0"]
    assert len(open_store(context.output / "studies" / "motion").votes()) == 6, "the votes must survive publishing"


def test_votes_cast_while_the_stage_runs_again_are_kept(inputs: dict[str, Path], tmp_path: Path) -> None:
    """The page stays open over two publications, which replace the study's folder under it; so does a copy of the
    published votes, on a machine that has nothing else."""
    context = make_context(inputs, tmp_path, judge="people", axes=["motion"])
    calibration.run(context)
    study = context.output / "studies" / "motion"
    page = TestClient(build_app(study), base_url="http://127.0.0.1")
    page.get("/?rater=somebody")

    def answer() -> bool:
        shown = page.get("/api/next").json()
        if not shown["done"]:
            assert page.get(shown["left"]).status_code == 200
            body = {"question": shown["question"], "side": "left"}
            assert page.post("/api/vote", json=body).json() == {"stored": True}
        return not shown["done"]

    assert answer() and answer()
    calibration.run(StageContext(context.preset, inputs, context.output, tmp_path / "second"))
    while answer():
        pass
    report = calibration.run(StageContext(context.preset, inputs, context.output, tmp_path / "third"))
    stored = len(open_store(study).export())
    assert report.metrics["votes_people"] + report.metrics["votes_missing"] == 6 and stored >= 6
    elsewhere = shutil.copytree(study, tmp_path / "a" / "b" / "c" / "motion")
    assert "/" in load_study(study).votes_file and len(open_store(elsewhere).export()) == stored


def test_other_weights_make_old_votes_void(automatic: StageContext, inputs: dict[str, Path], tmp_path: Path) -> None:
    key = calibration.identity(automatic)
    assert calibration.published(automatic.output, key) is not None
    other = make_context(inputs, tmp_path, judge="encoders", offset_noise=0.2)
    assert calibration.identity(other) != key
    assert calibration.published(automatic.output, calibration.identity(other)) is None


def test_subsets_come_from_the_unfiltered_start_set(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = make_context(inputs, tmp_path).preset.threshold_calibration
    start = start_set(inputs["curation"], config, seed=0)
    train = start.filter(pl.col("split") == "train")
    assert len(train) == 7 and start["clip_id"].n_unique() == len(start) == 11
    assert not start["keep"].any(), "the filters' verdict plays no role"
    assert start_set(inputs["curation"], config, seed=0).equals(start)
    assert not start_set(inputs["curation"], config, seed=3)["clip_id"].equals(start["clip_id"])
    half = training_subset(start, Candidate("motion-50", "motion", 0.5))
    rest = train.filter(~pl.col("clip_id").is_in(sorted(half.clips)))
    assert 0 < len(rest) <= 0.5 * len(train) and rest["motion_score"].max() < half.thresholds["motion"]
    assert len(training_subset(start, Candidate("captions-sidecar", "captions", captioner="sidecar")).clips) < 7
    with pytest.raises(UserError, match="no scores for 'aesthetics'"):
        training_subset(start, Candidate("aesthetics-50", "aesthetics", 0.5))
    with pytest.raises(UserError, match="no clip has a caption by 'coca'"):
        training_subset(start, Candidate("captions-coca", "captions", captioner="coca"))


def test_prompts_are_captions_of_test_clips(inputs: dict[str, Path], tmp_path: Path) -> None:
    preset = make_context(inputs, tmp_path).preset
    start = start_set(inputs["curation"], preset.threshold_calibration, 0)
    assert set(choose_prompts(start, preset).values()) < {f"thing {k}" for k in range(8, 12)}
    with pytest.raises(UserError, match=r"4 different captions, 'threshold_calibration\.prompts' wants 9"):
        choose_prompts(start, make_context(inputs, tmp_path, prompts=9).preset)


def test_an_axis_with_one_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"threshold_calibration\.removed"):
        candidates(load_preset("tiny", {"threshold_calibration.removed": [0.25]}))


@pytest.mark.parametrize(("axis", "winner"), [("motion", "b"), ("aesthetics", "b"), ("similarity", "a")])
def test_quality_outweighs_prompt_following_on_some_axes(axis: str, winner: str) -> None:
    """a follows prompts far better, b looks slightly better: the mean prefers a, quality alone b."""
    votes = [Vote(f"{k}", *("ab" if k % 9 == 0 or q == "prompt" else "ba"), True, "ann", q) for k in range(9)
             for q in ("quality", "prompt")]  # fmt: skip
    outcome = conclude(axis, [Candidate("a", ""), Candidate("b", axis, 0.25)], votes)
    assert outcome.chosen.name == winner


def test_of_equal_models_the_one_that_removes_less_is_chosen() -> None:
    votes = [Vote("p", *pair, True, "ann", q) for pair in ("ab", "ba") for q in ("quality", "prompt")]
    assert conclude("similarity", [Candidate("a", ""), Candidate("b", "similarity", 0.5)], votes).chosen.name == "a"


def test_the_automatic_judge_prefers_what_is_near_real_clips() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(0, [1.0, 100.0], (40, 2))
    near, wide, far = nearness(np.array([[0.0, 0.0], [0.0, 150.0], [6.0, 0.0]]), real)
    assert near > wide > far, "distances count in units of the real spread"
    quality = {("a", "p"): 1.0, ("b", "p"): 0.0}
    prompt = {("a", "p"): 0.0, ("b", "p"): 1.0}
    votes = cast_votes(["a", "b"], ["p"], {"quality": quality, "prompt": prompt}, votes=3, seed=0)
    assert len(votes) == 6 and {(v.axis, v.winner) for v in votes} == {("quality", "a"), ("prompt", "b")}
    assert {v.left_won for v in votes} == {True, False}
