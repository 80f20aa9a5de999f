"""Outcomes of the threshold calibration: Elo per question, the chosen share, the plots (E.2.2, Fig. 18)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.calibration.candidates import Candidate
from evaluation.preference.pairs import QUESTION_NAMES
from evaluation.preference.ratings import Rating, Vote, aggregated_elo, elo
from svd.catalogue import axes
from svd.storage import write_bytes

# E.2.2: on these axes visual quality counts more than prompt following.
BY_QUALITY = tuple(axis.name for axis in axes.AXES if axis.by_quality)
AGGREGATED = "aggregated"
Ratings = Mapping[str, Sequence[Rating]]


@dataclass(frozen=True)
class Outcome:
    """The ratings of an axis by question ("quality", "prompt", "aggregated") and the model that the rule chooses."""

    axis: str
    models: tuple[Candidate, ...]
    ratings: Ratings
    chosen: Candidate
    votes: int


def rate(votes: Sequence[Vote]) -> dict[str, list[Rating]]:
    """Return the paper's Elo for each question, and its mean over both (E.1.2).

    Raises ValueError for a question without votes.
    """
    by_axis = {axis: [vote for vote in votes if vote.axis == axis] for axis in QUESTION_NAMES}
    found = {axis: elo(part) for axis, part in by_axis.items()}
    return {**found, AGGREGATED: aggregated_elo(list(by_axis.values()))}


def rule(axis: str) -> str:
    """Return the rating that decides on an axis (E.2.2).

    Quality decides on motion and aesthetics, the mean of both questions on the other axes.
    """
    return "quality" if axis in BY_QUALITY else AGGREGATED


def conclude(axis: str, models: Sequence[Candidate], votes: Sequence[Vote]) -> Outcome:
    """Rate the models of an axis and choose the best by the axis' rule; of equals, the one that removes less."""
    ratings = rate(votes)
    values = {rating.model: rating.rating for rating in ratings[rule(axis)]}
    chosen = max(models, key=lambda model: (values[model.name], -models.index(model)))
    return Outcome(axis, tuple(models), ratings, chosen, len(votes))


def write_ratings(path: Path, outcome: Outcome, facts: Mapping[str, Mapping[str, Any]], judge: str) -> None:
    """Write the ratings of an axis, one row per question and model; low, high: 95 % over the orders of the votes."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    head = ["axis", "question", "model", "removed", "captioner", "clips", "elo", "relative", "low", "high", "votes"]
    writer.writerow([*head, "decides", "chosen", "judge"])
    for question, ratings in outcome.ratings.items():
        by_model = {rating.model: rating for rating in ratings}
        for model in outcome.models:
            r = by_model[model.name]
            numbers = [f"{value:.2f}" for value in (r.rating, r.relative, r.low, r.high)]
            about = [outcome.axis, question, model.name, model.removed, model.captioner, facts[model.name]["clips"]]
            marks = [int(question == rule(outcome.axis)), int(model == outcome.chosen), judge]
            writer.writerow([*about, *numbers, r.votes, *marks])
    write_bytes(path, stream.getvalue().encode())


def write_votes(path: Path, votes: Sequence[Vote]) -> None:
    """Write votes as CSV, without times; the column `rater` tells people from rules."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["prompt", "question", "winner", "loser", "left_won", "rater"])
    writer.writerows([v.prompt, v.axis, v.winner, v.loser, int(v.left_won), v.rater] for v in votes)
    write_bytes(path, stream.getvalue().encode())


def plot(path: Path, outcome: Outcome, judge: str) -> None:
    """Plot Elo against the share removed (or the captioner), as in Fig. 18.

    Each question is one line; the chosen model is marked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=110, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    places: list[float] = [100 * model.removed for model in outcome.models]
    if outcome.axis == "captions":
        places = [float(number) for number in range(len(outcome.models))]
    for question, ratings in outcome.ratings.items():
        by_model = {rating.model: rating for rating in ratings}
        rated = [by_model[model.name] for model in outcome.models]
        values = [r.rating for r in rated]
        # When all orders give one rating, rounding may put the mean outside its interval.
        spread = [[max(0.0, r.rating - r.low) for r in rated], [max(0.0, r.high - r.rating) for r in rated]]
        width = 2.2 if question == rule(outcome.axis) else 1.2
        axes.errorbar(places, values, spread, label=question, linewidth=width, marker="o", capsize=3)
    axes.axvline(places[outcome.models.index(outcome.chosen)], color="0.6", linestyle=":", label="chosen")
    axes.set_xticks(places, [model.label for model in outcome.models])
    axes.set_xlabel("captioner" if outcome.axis == "captions" else "clips removed, %")
    axes.set_ylabel("Elo")
    who = "votes of people" if judge == "people" else "AUTOMATIC votes, no people"
    axes.set_title(f"{outcome.axis}: {outcome.votes} {who}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def outcome_metrics(outcome: Outcome, judge: str) -> dict[str, float | int | str]:
    """Return flat metrics of an axis; with automatic votes every name says so."""
    prefix = outcome.axis if judge == "people" else f"{outcome.axis}_{judge}"
    chosen: float | str = outcome.chosen.captioner or outcome.chosen.removed
    name = "captioner" if outcome.chosen.captioner else "removed"
    metrics: dict[str, float | int | str] = {f"{prefix}_chosen_{name}": chosen}
    labels = {model.name: model.label for model in outcome.models}
    for question, ratings in outcome.ratings.items():
        metrics |= {f"{prefix}_elo_{question}_{labels[r.model]}": round(r.rating, 3) for r in ratings}
    return metrics
