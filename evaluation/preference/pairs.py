"""The questions of a study: every pair of models on every prompt, sides and order random by seed (App. E.1)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

QUESTIONS = {
    "quality": "Which video has the better visual quality?",
    "prompt": "Which video follows the prompt better?",
}
QUESTION_NAMES = tuple(QUESTIONS)


@dataclass(frozen=True)
class Question:
    """One comparison to be answered. check: the right side of an attention check; empty for a real question."""

    number: int
    prompt: str
    axis: str
    left: str
    right: str
    check: str = ""


def schedule(
    models: Sequence[str],
    prompts: Sequence[str],
    *,
    axes: Sequence[str] = QUESTION_NAMES,
    votes: int = 3,
    seed: int = 0,
    check_every: int = 12,
) -> list[Question]:
    """Ask for every pair of `models` on every prompt and axis, `votes` times, in random order, with checks.

    Sides are random for the first copy of a question and alternate in its other copies. An attention check (a clip
    against noise, see `clips.spoil`) comes about every `check_every` questions; 0: none. Raises ValueError for
    fewer than two models, no prompts, or repeated names.
    """
    _checked(models, prompts)
    rng = np.random.default_rng(seed)
    drawn: list[tuple[str, str, str, str, str]] = []
    for prompt, axis, pair in itertools.product(prompts, axes, itertools.combinations(models, 2)):
        flip = int(rng.integers(2))
        for copy in range(votes):
            left, right = pair if (copy + flip) % 2 else pair[::-1]
            drawn.append((prompt, axis, left, right, ""))
    order = rng.permutation(len(drawn))
    shuffled = [drawn[i] for i in order]
    with_checks = list(_with_checks(shuffled, models, rng, check_every))
    return [Question(number, *question) for number, question in enumerate(with_checks)]


def _checked(models: Sequence[str], prompts: Sequence[str]) -> None:
    if len(models) < 2:
        raise ValueError("a study needs at least two models")
    if not prompts:
        raise ValueError("a study needs at least one prompt")
    for what, names in (("model", models), ("prompt", prompts)):
        if len(set(names)) != len(names):
            raise ValueError(f"a {what} appears twice")


def _with_checks(
    questions: list[tuple[str, str, str, str, str]], models: Sequence[str], rng: np.random.Generator, every: int
) -> list[tuple[str, str, str, str, str]]:
    mixed = []
    for number, question in enumerate(questions):
        if every and number % every == every // 2:
            model = models[int(rng.integers(len(models)))]
            side = ("left", "right")[int(rng.integers(2))]
            mixed.append((question[0], "quality", model, model, side))
        mixed.append(question)
    return mixed
