"""`svd evaluate`: help for strangers, scores of folders, the gate's exit status, mistakes in one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from evaluation.frechet.distances import distance
from evaluation.frechet.moments import MomentState
from evaluation.frechet.protocol import named_protocols
from evaluation.frechet.results import Result, Score, result_json
from flows.cli.evaluate import evaluate_app
from svd.core.errors import UserError
from svd.core.files import write_json
from svd.media.video import write_mp4
from svd.synthetic.scenes import World, render_clip

RUNNER = CliRunner(env={"COLUMNS": "200"})


def evaluation(folder: Path, spread: float) -> Path:
    rng = np.random.default_rng(0)
    real, made, noise = (MomentState.of(scale * rng.normal(size=(64, 6))) for scale in (1.0, spread, 5.0))
    scores = (Score("generated", 0, distance(real, made)), Score("noise", 0, distance(real, noise)))
    about = json.loads(json.dumps(named_protocols()["tf_original"].describe()))
    folder.mkdir()
    write_json(folder / "result.json", result_json(Result("d", "m", "w", about, {}, scores)))
    return folder


@pytest.mark.parametrize("command", ["clips", "views", "compare", "gate", "protocols"])
def test_help(command: str) -> None:
    answer = RUNNER.invoke(evaluate_app, [command, "--help"])
    assert answer.exit_code == 0 and "Usage" in answer.output


def test_protocols_are_listed_with_their_digests() -> None:
    answer = RUNNER.invoke(evaluate_app, ["protocols"])
    assert all(name in answer.output and p.digest() in answer.output for name, p in named_protocols().items())


def test_gate_says_why_and_exits_with_its_verdict(tmp_path: Path) -> None:
    good, bad = evaluation(tmp_path / "good", 1.1), evaluation(tmp_path / "bad", 4.0)
    first = RUNNER.invoke(evaluate_app, ["gate", str(good)])
    assert first.exit_code == 0 and "passed: closer to the real clips than every control" in first.output
    worse = RUNNER.invoke(evaluate_app, ["gate", str(bad), str(good)])
    assert worse.exit_code == 1 and "failed: kernel distance +" in worse.output
    assert "kernel distance  +0 ± 0" in RUNNER.invoke(evaluate_app, ["compare", str(good), str(good)]).output


def test_clips_are_scored_and_written(tmp_path: Path) -> None:
    for name, start in (("real", 0), ("made", 50)):
        for number in range(5):
            frames = render_clip(World(0, "test"), start + number, 4, 32, 48, 8).frames
            write_mp4(tmp_path / name / f"{number}.mp4", frames, 8)
    folders = [str(tmp_path / "real"), str(tmp_path / "made")]
    options = ["--offline", "--frames", "4", "--samples", "5", "--work", str(tmp_path / "work")]
    to = ["--to", str(tmp_path / "rows.csv")]
    answer = RUNNER.invoke(evaluate_app, ["clips", *folders, "--protocol", "tf_original", *options, *to])
    assert answer.exit_code == 0 and "frechet_transnetv2" in answer.output
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert len(rows) == 1 and float(rows[0]["value"]) > 0 and rows[0]["generated"] == "5"


def test_mistakes(tmp_path: Path) -> None:
    def error(*words: str) -> str:
        answer = RUNNER.invoke(evaluate_app, list(words))
        assert answer.exit_code == 1 and isinstance(answer.exception, UserError)
        return str(answer.exception)

    assert "--weights" in error("clips", str(tmp_path), str(tmp_path))
    assert "known: svd_ucf101_paper" in error("clips", str(tmp_path), str(tmp_path), "--offline", "--protocol", "x")
    assert "0 clips" in error("clips", str(tmp_path), str(tmp_path), "--offline")
    assert "no evaluation there" in error("gate", str(tmp_path))
    assert "expected MODEL:STEP=FOLDER" in error("views", "checkpoints/1000")
