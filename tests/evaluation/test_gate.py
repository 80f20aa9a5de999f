"""The promotion gate: paired differences are sharper than unpaired ones, and only equal things are compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation.frechet.distances import distance
from evaluation.frechet.gate import compare_scores, judge_candidate
from evaluation.frechet.moments import MomentState
from evaluation.frechet.protocol import named_protocols
from evaluation.frechet.results import Result, Score, result_json
from svd.core.errors import UserError
from svd.core.files import write_json

REAL = np.random.default_rng(0).normal(size=(160, 12))
STATE = MomentState.of(REAL)
NOISE = MomentState.of(np.random.default_rng(1).normal(0, 5, size=(160, 12)))


def clips(seed: int, count: int = 160) -> np.ndarray:
    """What a model generates from a seed: the part that two models share, since they get the same noise and prompts."""
    return np.random.default_rng(seed).normal(0.1, 1.2, size=(count, 12))


def evaluation(folder: Path, made: np.ndarray, protocol: str = "svd_ucf101_paper", seed: int = 0, **changes) -> Path:
    scores = (
        Score("generated", seed, distance(STATE, MomentState.of(made))),
        Score("noise", 0, distance(STATE, NOISE)),
    )
    about = json.loads(json.dumps(named_protocols()[protocol].describe()))
    values = {"dataset": "d", "metric": "m", **changes}
    folder.mkdir(parents=True)
    write_json(folder / "result.json", result_json(Result(values["dataset"], values["metric"], "w", about, {}, scores)))
    return folder


def test_first_model_must_beat_its_controls(tmp_path: Path) -> None:
    assert judge_candidate(evaluation(tmp_path / "good", clips(5)), None).passed
    verdict = judge_candidate(evaluation(tmp_path / "bad", 6 * clips(5)), None)
    assert not verdict.passed and "noise" in verdict.reason


def test_better_and_equal_pass_and_worse_fails(tmp_path: Path) -> None:
    champion = evaluation(tmp_path / "champion", clips(5))
    assert judge_candidate(champion, champion).passed
    better = judge_candidate(evaluation(tmp_path / "better", 0.9 * clips(5)), champion)
    assert better.passed and better.kernel.value < 0 and better.frechet.value < 0
    worse = judge_candidate(evaluation(tmp_path / "worse", 1.6 * clips(5)), champion)
    assert not worse.passed and worse.kernel.value > 3 * worse.kernel.standard_error
    assert "allowed" in worse.reason and "\n" not in worse.reason


def test_a_small_change_is_within_tolerance(tmp_path: Path) -> None:
    champion = evaluation(tmp_path / "champion", clips(5))
    assert judge_candidate(evaluation(tmp_path / "near", 1.002 * clips(5)), champion, tolerance=0.1).passed
    assert not judge_candidate(evaluation(tmp_path / "far", 1.5 * clips(5)), champion, tolerance=0.0, sigmas=1.0).passed


def test_pairing_cancels_common_noise(tmp_path: Path) -> None:
    champion = evaluation(tmp_path / "champion", clips(5))
    paired, _ = compare_scores(evaluation(tmp_path / "paired", 1.1 * clips(5)), champion)
    unpaired, _ = compare_scores(evaluation(tmp_path / "unpaired", 1.1 * clips(6)), champion)
    assert paired.standard_error < 0.5 * unpaired.standard_error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "other"}, "dataset is d"),
        ({"metric": "fvd"}, "metric is m"),
        ({"protocol": "tf_original"}, "another protocol"),
        ({"seed": 7}, "other seeds"),
    ],
)
def test_other_things_are_not_compared(tmp_path: Path, changes: dict, message: str) -> None:
    champion = evaluation(tmp_path / "champion", clips(5))
    with pytest.raises(UserError, match=message):
        judge_candidate(evaluation(tmp_path / "candidate", clips(5), **changes), champion)


def test_missing_and_damaged_results_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no evaluation there"):
        judge_candidate(tmp_path, None)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        judge_candidate(tmp_path, None)
