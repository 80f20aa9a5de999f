"""`svd vote`: texts, questions, watermarks and address from the command line; mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from evaluation.preference import app
from evaluation.preference.study import load_study, open_store
from flows.cli.vote import vote_app
from svd.core.errors import UserError
from svd.media.video import read_frames, write_mp4

RUNNER = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    for model in ("ours", "theirs"):
        for name in ("generated-0", "generated-1"):
            write_mp4(tmp_path / model / f"{name}.mp4", rng.integers(100, 200, (4, 32, 48, 3), dtype=np.uint8), 8)
    return [f"{model}={tmp_path / model}" for model in ("ours", "theirs")]


def test_a_study_of_quality_alone_with_a_watermark(tmp_path: Path, models: list[str]) -> None:
    """The paper's image-to-video study: no texts, one question, Pika's corner black in all clips (E.3)."""
    folder = tmp_path / "study"
    answer = RUNNER.invoke(vote_app, ["create", str(folder), *models, "--watermark", "theirs=0.5,0.5,1,1"])
    assert answer.exit_code == 0 and "asked for quality;" in answer.output
    assert {q.axis for q in open_store(folder).questions()} == {"quality"}
    for number in range(2):
        frames, _ = read_frames(folder / "clips" / "generated-0" / f"{number}.mp4")
        assert frames[:, 20:, 28:].max() < 30 and frames[:, :12].min() > 60


def test_texts_come_from_a_file_and_both_questions_with_them(tmp_path: Path, models: list[str]) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps({"generated-1": "A red ring"}))
    folder = tmp_path / "study"
    answer = RUNNER.invoke(vote_app, ["create", str(folder), *models, "--prompts", str(tmp_path / "prompts.json")])
    assert answer.exit_code == 0, answer.output
    study = load_study(folder)
    assert study.prompts == {"generated-1": "A red ring"} and study.axes == ("quality", "prompt")


def test_serve_and_results(tmp_path: Path, models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "study"
    RUNNER.invoke(vote_app, ["create", str(folder), *models, "--axis", "prompt", "--votes", "1"])
    served: list[tuple] = []
    monkeypatch.setattr(app, "serve", lambda *arguments: served.append(arguments))
    assert RUNNER.invoke(vote_app, ["serve", str(folder), "--host", "0.0.0.0", "--port", "9"]).exit_code == 0
    assert served == [(folder, "0.0.0.0", 9, None, [])]
    store = open_store(folder)
    for question in store.questions():
        store.answer(question.number, "somebody", question.check or "left", 100)
    answer = RUNNER.invoke(vote_app, ["results", str(folder)])
    assert answer.exit_code == 0 and set(json.loads(answer.output)["axes"]) == {"prompt"}
    assert (folder / "ratings.png").is_file()


def test_mistakes(tmp_path: Path, models: list[str]) -> None:
    def error(*words: str) -> str:
        answer = RUNNER.invoke(vote_app, ["create", str(tmp_path / "study"), *words])
        assert answer.exit_code == 1 and isinstance(answer.exception, UserError)
        return str(answer.exception)

    assert "NAME=FOLDER" in error("ours", models[1])
    assert "name each model once" in error(models[0], models[0])
    assert "TOP,LEFT,BOTTOM,RIGHT with one of ours, theirs" in error(*models, "--watermark", "pika=0.9,0.8,1,1")
    assert "TOP,LEFT,BOTTOM,RIGHT" in error(*models, "--watermark", "ours=0.9,0.8,1")
    assert "not in the picture" in error(*models, "--watermark", "ours=0.9,0.8,1,2")
    assert "no prompts" in error(*models, "--prompts", str(tmp_path / "absent.json"))
