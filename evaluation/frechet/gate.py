"""The gate of promotion: a paired comparison of two evaluations of the same prompts, seeds and real clips.

Both evaluations share their blocks, so the differences of their leave-one-out values give a standard error in which the
common noise cancels. The gate decides by the unbiased kernel distance: it doesn't depend on the number of clips, and at
a few hundred clips it is far less noisy than a Fréchet distance, which is reported for the trend.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.frechet.distances import jackknife
from evaluation.frechet.results import load_result
from svd.core.errors import UserError


@dataclass(frozen=True)
class Delta:
    """Candidate minus champion, with the standard error of the difference; below zero is better."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Verdict:
    """The gate's decision. `reason` is one line; the deltas are None for a first model."""

    passed: bool
    reason: str
    kernel: Delta | None = None
    frechet: Delta | None = None


def _generated(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [score for score in result["scores"] if score["subject"] == "generated"]


def _statistic(score: dict[str, Any], kernel: bool) -> tuple[float, list[float]]:
    distance = score["distance"]
    if kernel:
        return distance["kernel"]["unbiased"], distance["kernel_replicates"]
    return distance["frechet"]["value"], distance["replicates"]


def paired_delta(first: list[dict[str, Any]], second: list[dict[str, Any]], *, kernel: bool) -> Delta:
    """Return the mean over seeds of `first` minus `second`, with the jackknife error of that difference.

    Raises ValueError when the two don't have the same number of blocks.
    """
    differences, replicates = [], []
    for a, b in zip(first, second, strict=True):
        (value_a, left_a), (value_b, left_b) = _statistic(a, kernel), _statistic(b, kernel)
        differences.append(value_a - value_b)
        replicates.append(np.asarray(left_a) - np.asarray(left_b))
    mean = float(np.mean(differences))
    return Delta(mean, jackknife(mean, list(np.mean(replicates, axis=0)))[0])


def compare_scores(candidate: Path, champion: Path) -> tuple[Delta, Delta]:
    """Return the (kernel, Fréchet) deltas of two evaluation folders; raises UserError when they can't be compared."""
    new, old = load_result(candidate), load_result(champion)
    for what in ("dataset", "metric"):
        if new[what] != old[what]:
            raise UserError(f"{champion}: its {what} is {old[what]}, the candidate's is {new[what]}; evaluate it again")
    if new["protocol"]["digest"] != old["protocol"]["digest"]:
        raise UserError(f"{champion}: scored by another protocol than {candidate}; evaluate it again")
    for what, about in (("real_clips", "other real clips"), ("sampling", "clips that were sampled differently")):
        if new.get(what) != old.get(what):
            raise UserError(f"{champion}: scored with {about} than {candidate}; evaluate it again")
    first, second = _generated(new), _generated(old)
    if [_size(score) for score in first] != [_size(score) for score in second]:
        raise UserError(f"{champion}: other seeds or another number of clips than {candidate}; evaluate it again")
    return paired_delta(first, second, kernel=True), paired_delta(first, second, kernel=False)


def _size(score: dict[str, Any]) -> tuple[int, int, int]:
    return score["seed"], score["distance"]["real"], score["distance"]["generated"]


def judge_candidate(candidate: Path, champion: Path | None, tolerance: float = 0.05, sigmas: float = 3.0) -> Verdict:
    """Decide whether the model evaluated in folder `candidate` may replace the one evaluated in `champion`.

    It must be closer to the real clips than every control in its own run. It must not be worse than the champion (None:
    there is none yet) by more than max(`sigmas` standard errors, `tolerance` × the champion's distance). Raises
    UserError for evaluations that can't be compared.
    """
    result = load_result(candidate)
    failed = _lost_against(result)
    if failed:
        return Verdict(False, f"not closer to the real clips than: {', '.join(failed)}")
    if champion is None:
        return Verdict(True, "closer to the real clips than every control; there is no champion yet")
    kernel, frechet = compare_scores(candidate, champion)
    reference = float(np.mean([_statistic(s, True)[0] for s in _generated(load_result(champion))]))
    allowed = max(sigmas * kernel.standard_error, tolerance * abs(reference))
    passed = kernel.value <= allowed
    reason = (
        f"kernel distance {kernel.value:+.4g} ± {kernel.standard_error:.2g} against the champion's {reference:.4g}, "
        f"allowed {allowed:+.2g}; {result['metric']} {frechet.value:+.4g} ± {frechet.standard_error:.2g}"
    )
    return Verdict(passed, reason, kernel, frechet)


def _lost_against(result: dict[str, Any]) -> list[str]:
    """Return the controls that are as close to the real clips as the generated ones, by the mean over seeds."""
    by_subject: dict[str, list[float]] = {}
    for score in result["scores"]:
        by_subject.setdefault(score["subject"], []).append(_statistic(score, True)[0])
    own = float(np.mean(by_subject["generated"]))
    controls = ("noise", "mean-frame", "untrained")
    return [name for name in controls if name in by_subject and float(np.mean(by_subject[name])) <= own]
