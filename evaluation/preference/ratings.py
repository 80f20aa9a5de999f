"""Ratings from votes: Elo exactly as in the paper (App. E.1.2), and Bradley-Terry with valid intervals.

After a study of the paper's size, Elo with K = 1 has not converged, so its ratings depend on the number of votes; it is
computed for comparison with the paper. Votes on one prompt are correlated, so the Bradley-Terry intervals resample
prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SCALE = math.log(10) / 400  # Elo points to log-odds


@dataclass(frozen=True)
class Vote:
    """One answer: `winner` beat `loser` on a prompt. left_won: the winner stood on the left. rater: who answered."""

    prompt: str
    winner: str
    loser: str
    left_won: bool
    rater: str = ""
    axis: str = "quality"


@dataclass(frozen=True)
class Rating:
    """A model's rating in Elo points. relative: above the last-ranked model. low, high: interval of 95 %."""

    model: str
    rating: float
    relative: float
    low: float
    high: float
    votes: int


@dataclass(frozen=True)
class SideBias:
    """How often the left clip won, and the two-sided p value under no preference."""

    left: int
    votes: int
    p_value: float


def models_of(votes: Sequence[Vote]) -> list[str]:
    """Return all models in the votes, sorted."""
    return sorted({vote.winner for vote in votes} | {vote.loser for vote in votes})


def elo_runs(
    votes: Sequence[Vote], shuffles: int = 1000, seed: int = 0, k: float = 1.0, initial: float = 1000.0
) -> tuple[list[str], Array]:
    """Return the models and their final Elo (shuffles, models) over seeded random orders of the votes (App. E.1.2).

    E₁ = 1 / (1 + 10^((R₂ − R₁) / 400)); R ← R + K (S − E), S = 1 for the winner. All shuffles advance together.
    """
    models = models_of(votes)
    index = {model: number for number, model in enumerate(models)}
    winners = np.array([index[vote.winner] for vote in votes], dtype=np.int64)
    losers = np.array([index[vote.loser] for vote in votes], dtype=np.int64)
    rng = np.random.default_rng(seed)
    orders = np.stack([rng.permutation(len(votes)) for _ in range(shuffles)])
    ratings = np.full((shuffles, len(models)), initial)
    rows = np.arange(shuffles)
    for step in range(len(votes)):
        won, lost = winners[orders[:, step]], losers[orders[:, step]]
        expected = 1.0 / (1.0 + 10.0 ** ((ratings[rows, lost] - ratings[rows, won]) / 400.0))
        change = k * (1.0 - expected)
        ratings[rows, won] += change
        ratings[rows, lost] -= change
    return models, ratings


def elo(votes: Sequence[Vote], shuffles: int = 1000, seed: int = 0) -> list[Rating]:
    """Return the paper's Elo: K = 1, initially 1000, mean over 1000 orders; best first.

    low, high: 2.5 % and 97.5 % over the orders; the noise of the order alone, not of the raters. Raises ValueError
    without votes.
    """
    _need(votes)
    models, ratings = elo_runs(votes, shuffles, seed)
    low, high = np.quantile(ratings, [0.025, 0.975], axis=0)
    return _rated(models, ratings.mean(axis=0), low, high, votes)


def _need(votes: Sequence[Vote]) -> None:
    if not votes:
        raise ValueError("no votes to rate models with")


def _rated(models: list[str], ratings: Array, low: Array, high: Array, votes: Sequence[Vote]) -> list[Rating]:
    last = float(ratings.min())
    counts = {model: sum(model in (vote.winner, vote.loser) for vote in votes) for model in models}
    found = [
        Rating(model, float(r), float(r) - last, float(a), float(b), counts[model])
        for model, r, a, b in zip(models, ratings, low, high, strict=True)
    ]
    return sorted(found, key=lambda rating: (-rating.rating, rating.model))


def win_matrix(votes: Sequence[Vote], models: Sequence[str]) -> Array:
    """Return how often model i beat model j at (i, j)."""
    index = {model: number for number, model in enumerate(models)}
    wins = np.zeros((len(models), len(models)))
    for vote in votes:
        wins[index[vote.winner], index[vote.loser]] += 1
    return wins


def fit_bradley_terry(wins: Array, ridge: float = 1e-3, iterations: int = 100) -> Array:
    """Fit strengths (models,) in Elo points, of mean 0, to wins (models, models) by Newton's method; ridge > 0.

    The ridge keeps an undefeated model finite. Maximises Σ wins·log σ(θᵢ − θⱼ) − ridge/2·Σ wins·Σ θ².
    """
    count = len(wins)
    games = wins + wins.T
    penalty = ridge * max(1.0, float(wins.sum()))
    theta = np.zeros(count)
    for _ in range(iterations):
        probability = 1.0 / (1.0 + np.exp(np.clip(theta[None, :] - theta[:, None], -50, 50)))
        gradient = (wins - games * probability).sum(axis=1) - penalty * theta
        weight = games * probability * (1.0 - probability)
        hessian = np.diag(weight.sum(axis=1) + penalty) - weight
        step = np.linalg.solve(hessian, gradient)
        theta = theta + step * min(1.0, 4.0 / max(float(np.abs(step).max()), 1e-300))
        if np.abs(step).max() < 1e-10:
            break
    return (theta - theta.mean()) / _SCALE


def bradley_terry(votes: Sequence[Vote], resamples: int = 600, seed: int = 0, ridge: float = 1e-3) -> list[Rating]:
    """Return Bradley-Terry ratings around 1000 with 95 % intervals from resampling prompts; best first.

    Votes on one prompt are correlated: resampling single votes would give intervals that are a third too small.
    Raises ValueError without votes.
    """
    _need(votes)
    found = _bradley_terry_runs(votes, _prompts(votes), resamples, seed, ridge)
    low, high = np.quantile(found.samples, [0.025, 0.975], axis=0)
    return _rated(found.models, found.rating, low, high, votes)


@dataclass(frozen=True)
class _Runs:
    """Ratings of models (M,), and those in other orders or on resampled prompts (R, M)."""

    models: list[str]
    rating: Array
    samples: Array


def _prompts(votes: Sequence[Vote]) -> list[str]:
    return sorted({vote.prompt for vote in votes})


def _bradley_terry_runs(
    votes: Sequence[Vote], prompts: Sequence[str], resamples: int, seed: int, ridge: float
) -> _Runs:
    """Fit to resamples of `prompts`; the resamples depend on prompts and seed alone, not on the votes."""
    models = models_of(votes)
    by_prompt = np.stack([win_matrix([v for v in votes if v.prompt == p], models) for p in prompts])
    point = fit_bradley_terry(by_prompt.sum(axis=0), ridge)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(prompts), [1 / len(prompts)] * len(prompts), size=resamples)
    samples = np.stack([fit_bradley_terry(np.tensordot(c, by_prompt, axes=1), ridge) for c in counts.astype(float)])
    return _Runs(models, 1000 + point, 1000 + samples)


def aggregated_elo(by_axis: Sequence[Sequence[Vote]], shuffles: int = 1000, seed: int = 0) -> list[Rating]:
    """Return the paper's aggregated score: the mean Elo over the axes (visual quality, prompt following).

    low, high: 2.5 % and 97.5 % of the mean, over orders that are independent between the axes.
    """
    runs = [elo_runs(votes, shuffles, seed) for votes in by_axis]
    # One seed draws the same orders for equal numbers of votes: rolled, no two axes meet in the same order.
    parts = [_Runs(models, r.mean(axis=0), np.roll(r, axis, axis=0)) for axis, (models, r) in enumerate(runs)]
    return _aggregated(parts, by_axis)


def aggregated_bradley_terry(
    by_axis: Sequence[Sequence[Vote]], resamples: int = 600, seed: int = 0, ridge: float = 1e-3
) -> list[Rating]:
    """Return the mean Bradley-Terry rating over the axes, with 95 % intervals from resampling prompts.

    All axes use the same resamples, since all questions are asked about the same clips.
    """
    prompts = _prompts([vote for votes in by_axis for vote in votes])
    return _aggregated([_bradley_terry_runs(votes, prompts, resamples, seed, ridge) for votes in by_axis], by_axis)


def _aggregated(parts: Sequence[_Runs], by_axis: Sequence[Sequence[Vote]]) -> list[Rating]:
    """Return means over the axes on which a model has votes."""
    models = sorted({model for part in parts for model in part.models})
    ratings, samples = [], []
    for model in models:
        places = [(part, part.models.index(model)) for part in parts if model in part.models]
        ratings.append(np.mean([part.rating[place] for part, place in places]))
        samples.append(np.mean([part.samples[:, place] for part, place in places], axis=0))
    low, high = np.quantile(samples, [0.025, 0.975], axis=1)
    return _rated(models, np.asarray(ratings), low, high, [vote for votes in by_axis for vote in votes])


def agreement(votes: Sequence[Vote]) -> float:
    """Measure how much raters of one question (prompt, pair, axis) agree: 1 always, 0 as often as by chance.

    Bennett's S for two options, 2·P − 1 with P the share of agreeing pairs of answers, questions weighted by their
    number of answers; unlike kappa and alpha it doesn't depend on the order of the models. NaN when no question has
    two answers.
    """
    questions: dict[tuple[str, str, str, str], list[str]] = {}
    for vote in votes:
        first, second = sorted((vote.winner, vote.loser))
        questions.setdefault((vote.axis, vote.prompt, first, second), []).append(vote.winner)
    answered = [answers for answers in questions.values() if len(answers) > 1]
    if not answered:
        return math.nan
    shares = [sum(a.count(m) * (a.count(m) - 1) for m in set(a)) / (len(a) * (len(a) - 1)) for a in answered]
    return 2 * float(np.average(shares, weights=[len(a) for a in answered])) - 1


def side_bias(votes: Sequence[Vote]) -> SideBias:
    """Test whether raters prefer a side: exact two-sided binomial test against one half."""
    count, left = len(votes), sum(vote.left_won for vote in votes)
    log_weights = np.array(
        [math.lgamma(count + 1) - math.lgamma(i + 1) - math.lgamma(count - i + 1) for i in range(count + 1)]
    )
    weights = np.exp(log_weights - count * math.log(2))
    p_value = float(weights[weights <= weights[left] * (1 + 1e-9)].sum())
    return SideBias(left, count, min(1.0, p_value))
