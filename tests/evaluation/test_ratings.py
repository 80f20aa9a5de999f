"""Elo by hand, Bradley-Terry against its closed form, intervals that cover, agreement and side bias."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from evaluation.preference.ratings import (
    Vote,
    aggregated_bradley_terry,
    aggregated_elo,
    agreement,
    bradley_terry,
    elo,
    elo_runs,
    fit_bradley_terry,
    side_bias,
    win_matrix,
)


def vote(winner: str, loser: str, prompt: str = "p", left: bool = True, rater: str = "r") -> Vote:
    return Vote(prompt, winner, loser, left, rater)


def simulated(strengths: dict[str, float], prompts: int, votes: int, seed: int, spread: float = 0.0) -> list[Vote]:
    """Votes of a study; `spread`: standard deviation (Elo points) of what one prompt does to each model."""
    rng = np.random.default_rng(seed)
    found = []
    for prompt in range(prompts):
        shift = {model: rng.normal(0, spread) for model in strengths}
        for a, b in itertools.combinations(strengths, 2):
            gap = strengths[a] + shift[a] - strengths[b] - shift[b]
            for _ in range(votes):
                won = rng.random() < 1 / (1 + 10 ** (-gap / 400))
                found.append(vote(a if won else b, b if won else a, f"p{prompt}", bool(rng.random() < 0.5)))
    return found


def test_elo_of_three_games_by_hand() -> None:
    """A beats B, then B beats C, then A beats C, K = 1."""
    games = [("A", "B"), ("B", "C"), ("A", "C")]
    rating = {"A": 1000.0, "B": 1000.0, "C": 1000.0}
    rating["A"], rating["B"] = 1000.5, 999.5
    change = 1 - 1 / (1 + 10 ** ((1000.0 - 999.5) / 400))
    rating["B"], rating["C"] = 999.5 + change, 1000.0 - change
    change = 1 - 1 / (1 + 10 ** ((rating["C"] - 1000.5) / 400))
    rating["A"], rating["C"] = 1000.5 + change, rating["C"] - change
    votes = [vote(a, b) for a, b in games]
    models, runs = elo_runs(votes, shuffles=200, seed=0)
    assert models == ["A", "B", "C"]
    assert (np.abs(runs - [rating[m] for m in models]).max(axis=1) < 1e-12).any()
    np.testing.assert_allclose(runs.sum(axis=1), 3000)


def test_elo_equals_a_loop_over_the_same_orders() -> None:
    votes = simulated({"a": 900, "b": 1000, "c": 1100}, 4, 2, 0)
    models, runs = elo_runs(votes, shuffles=5, seed=7)
    rng = np.random.default_rng(7)
    for run in runs:
        rating = dict.fromkeys(models, 1000.0)
        for game in rng.permutation(len(votes)):
            v = votes[game]
            expected = 1 / (1 + 10 ** ((rating[v.loser] - rating[v.winner]) / 400))
            rating[v.winner] += 1 - expected
            rating[v.loser] -= 1 - expected
        np.testing.assert_allclose(run, [rating[m] for m in models])


def test_elo_is_the_mean_over_seeded_orders_relative_to_the_last() -> None:
    votes = simulated({"a": 900, "b": 1000, "c": 1100}, 12, 3, 1)
    found = elo(votes)
    assert found == elo(votes) != elo(votes, seed=1)
    assert [r.model for r in found] == ["c", "b", "a"] and found[-1].relative == 0
    _, runs = elo_runs(votes, 1000, 0)
    assert found[0].rating == pytest.approx(runs[:, 2].mean())
    assert found[0].relative == pytest.approx(runs[:, 2].mean() - runs[:, 0].mean())


def test_elo_with_k_1_depends_on_the_number_of_votes_and_bradley_terry_does_not() -> None:
    votes = simulated({"a": 910, "b": 970, "c": 1030, "d": 1090}, 64, 3, 2)
    spread = [elo(v, shuffles=50)[0].relative for v in (votes, votes * 5)]
    assert spread[1] > 1.3 * spread[0]
    ratings = [bradley_terry(v, resamples=20)[0].relative for v in (votes, votes * 5)]
    assert ratings[0] == pytest.approx(ratings[1])


@pytest.mark.parametrize(("wins", "losses"), [(30, 10), (7, 5)])
def test_two_models_have_the_closed_form(wins: int, losses: int) -> None:
    found = fit_bradley_terry(np.array([[0.0, wins], [losses, 0.0]]), ridge=1e-9)
    assert found[0] - found[1] == pytest.approx(400 * math.log10(wins / losses), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=6, max_size=6))
def test_the_fit_is_a_stationary_point(counts: list[int]) -> None:
    wins = np.zeros((3, 3))
    wins[[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]] = counts
    theta = fit_bradley_terry(wins, ridge=1e-3) * math.log(10) / 400
    probability = 1 / (1 + np.exp(theta[None] - theta[:, None]))
    gradient = (wins - (wins + wins.T) * probability).sum(1) - 1e-3 * max(1.0, wins.sum()) * theta
    assert np.abs(gradient).max() < 1e-6


def test_an_undefeated_model_stays_finite() -> None:
    votes = [vote("best", other, f"p{i}") for i in range(40) for other in ("x", "y")]
    votes += [vote("x", "y", f"p{i}") if i % 2 else vote("y", "x", f"p{i}") for i in range(40)]
    found = bradley_terry(votes, resamples=50)
    assert found[0].model == "best" and np.isfinite([found[0].rating, found[0].low, found[0].high]).all()
    assert 300 < found[0].relative < 3000


def test_intervals_clustered_by_prompt_are_wider_when_prompts_matter_and_cover_the_truth() -> None:
    strengths = {"a": 940.0, "b": 1060.0}
    covered, width = 0, []
    for seed in range(40):
        votes = simulated(strengths, 24, 3, seed, spread=200.0)
        found = {r.model: r for r in bradley_terry(votes, resamples=120, seed=seed)}
        # Averaging over prompts shrinks the gap, so the aim is the mean estimate of many studies, not 120.
        width.append(found["b"].high - found["b"].low)
        covered += found["b"].low <= 1042 <= found["b"].high
    single = [Vote(f"{i}", v.winner, v.loser, v.left_won) for i, v in enumerate(simulated(strengths, 24, 3, 0, 200.0))]
    by_vote = next(r for r in bradley_terry(single, resamples=120) if r.model == "b")
    assert covered >= 34
    assert np.mean(width) > 1.15 * (by_vote.high - by_vote.low)


def test_win_matrix_and_aggregation() -> None:
    votes = [vote("a", "b"), vote("a", "b"), vote("b", "a")]
    assert win_matrix(votes, ["a", "b"]).tolist() == [[0, 2], [1, 0]]
    other = [vote("b", "a"), vote("b", "a"), vote("a", "b")]
    both = aggregated_bradley_terry([votes, other], 20)
    assert [r.rating for r in both] == pytest.approx([1000, 1000]) and [r.votes for r in both] == [6, 6]
    assert aggregated_bradley_terry([votes, votes], 20)[0].rating == pytest.approx(bradley_terry(votes, 20)[0].rating)
    for rate in (elo, bradley_terry):
        with pytest.raises(ValueError, match="no votes"):
            rate([])


def test_the_aggregated_score_is_the_mean_of_the_axes_and_its_interval_is_its_own() -> None:
    """Two independent axes make an interval narrower by √2; the mean of the axes' ends would be as wide as they are.
    Of two equal axes the mean is known no better than either."""
    strengths = {"a": 940.0, "b": 1000.0, "c": 1060.0}
    quality, prompt = (simulated(strengths, 64, 3, seed, spread=150.0) for seed in (0, 1))
    axes = [{r.model: r for r in bradley_terry(votes)} for votes in (quality, prompt)]
    width = np.mean([r.high - r.low for axis in axes for r in axis.values()])
    both = aggregated_bradley_terry([quality, prompt])
    for rating in both:
        assert rating.rating == pytest.approx(np.mean([axis[rating.model].rating for axis in axes]))
    assert 0.6 < np.mean([r.high - r.low for r in both]) / width < 0.85
    assert aggregated_bradley_terry([quality, quality])[0].high == pytest.approx(bradley_terry(quality)[0].high)
    paper = aggregated_elo([quality, prompt])
    single = [{r.model: r for r in elo(votes)} for votes in (quality, prompt)]
    for rating in paper:
        assert rating.rating == pytest.approx(np.mean([axis[rating.model].rating for axis in single]))
    orders = np.mean([r.high - r.low for axis in single for r in axis.values()])
    assert 0.6 < np.mean([r.high - r.low for r in aggregated_elo([quality, quality])]) / orders < 0.85


def test_a_model_that_stands_on_one_axis_keeps_its_rating_there() -> None:
    votes = simulated({"a": 950.0, "b": 1050.0}, 10, 2, 0)
    more = simulated({"a": 950.0, "b": 1050.0, "c": 1000.0}, 10, 2, 1)
    found = {r.model: r for r in aggregated_bradley_terry([votes, more], 20)}
    assert found["c"].rating == pytest.approx({r.model: r for r in bradley_terry(more, 20)}["c"].rating)


def test_agreement_by_hand() -> None:
    """Two raters agree on three of four questions: 2 · 3/4 − 1."""
    votes = []
    for prompt, (one, two) in enumerate([("a", "a"), ("a", "a"), ("b", "b"), ("a", "b")]):
        for rater, winner in (("1", one), ("2", two)):
            votes.append(vote(winner, "b" if winner == "a" else "a", f"p{prompt}", rater=rater))
    assert agreement(votes) == pytest.approx(0.5)
    assert agreement([v for v in votes if v.prompt != "p3"]) == pytest.approx(1.0)
    three = [vote("a", "b"), vote("a", "b"), vote("b", "a")]
    assert agreement(three) == pytest.approx(2 * (1 / 3) - 1)
    renamed = [vote(*("x" if m == "a" else "b" for m in (v.winner, v.loser)), v.prompt, rater=v.rater) for v in votes]
    assert agreement(renamed) == agreement(votes)
    assert math.isnan(agreement(votes[:1]))


@pytest.mark.parametrize(("left", "count"), [(5, 10), (9, 10), (61, 200), (0, 7)])
def test_side_bias_is_the_exact_binomial_test(left: int, count: int) -> None:
    found = side_bias([vote("a", "b", left=i < left) for i in range(count)])
    assert (found.left, found.votes) == (left, count)
    assert found.p_value == pytest.approx(binomtest(left, count).pvalue)
