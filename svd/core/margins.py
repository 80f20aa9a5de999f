"""How sure a difference is: the mean of paired differences in units of its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NEEDED = 3.0  # standard errors from which a difference counts as shown
FEWEST = 8  # clips, objects or samples; of fewer, a standard error is itself a guess
_ALIKE = 1e-9  # of the greatest difference: a spread that rounding makes of differences that are all alike


def is_shown(margin: float | None, n: int) -> bool:
    """Whether a difference of `margin` standard errors over n independent clips, objects or samples counts as shown.

    >>> is_shown(3.1, 8), is_shown(3.1, 7), is_shown(2.9, 100), is_shown(None, 100)
    (True, False, False, False)
    """
    return margin is not None and margin >= NEEDED and n >= FEWEST


def margin(
    differences: Sequence[float], strata: Sequence[float] | None = None, clusters: Sequence[str] | None = None
) -> float | None:
    """Return mean over standard error of the mean of N differences; None when it isn't known.

    strata: what was fixed for each of them, such as a noise level out of a few; the spread between strata then doesn't
    count as error. With fewer than two differences in a stratum the strata are ignored. clusters: what each is a
    difference of, such as a clip; only clusters count as independent, and without them all N do. Where a cluster shares
    no stratum with another one, even by way of others, its own mean can't be told from the strata's: they are ignored.
    None: fewer than two independent ones, or differences that are all alike, whose spread says nothing.

    >>> margin([1.0, 2.0, 3.0]), margin([1.0]), margin([0.0, 0.0])
    (3.4641016151377544, None, None)
    >>> margin([1.0, 1.2, 5.0, 5.2], strata=[0, 0, 1, 1])  # without strata: 2.68
    43.84062043356595
    >>> margin([1.0, 3.0, 1.0, 3.0], clusters=["a", "b", "a", "b"])  # two clips, however often they are drawn
    2.0
    """
    values = np.asarray(differences, np.float64)
    labels = np.zeros(len(values)) if strata is None else np.asarray(strata)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if min((len(group) for group in groups), default=0) < 2:
        groups = [np.arange(len(values))]
    if len(values) < 2 or all(np.ptp(values[group]) <= _ALIKE * np.abs(values[group]).max() for group in groups):
        return None
    if clusters is None:
        variance = sum(len(group) * values[group].var(ddof=1) for group in groups) / len(values) ** 2
    else:
        names = np.asarray(clusters)
        if any(len(block) < 2 for block in _linked(groups, names)):
            groups = [np.arange(len(values))]
        variance = _clustered_variance(values, groups, names)
    return float(values.mean() / math.sqrt(variance)) if variance > 0 else None


def _linked(groups: Sequence[np.ndarray], clusters: np.ndarray) -> list[set[str]]:
    """Return the blocks of clusters that groups link: clusters (N,) of two blocks have no group in common."""
    blocks: list[set[str]] = []
    for group in groups:
        block = set(clusters[group].tolist())
        block = block.union(*(other for other in blocks if other & block))
        blocks = [other for other in blocks if not other & block] + [block]
    return blocks


def _clustered_variance(values: np.ndarray, groups: Sequence[np.ndarray], clusters: np.ndarray) -> float:
    """Return the variance of the mean of values (N,) around the means of their groups, when only clusters (N,) differ.

    The cluster-robust estimate, with G / (G - 1) for the G clusters of each block: the means of its groups take up the
    mean of its clusters. 0 for one cluster.
    """
    left = values.copy()
    for group in groups:
        left[group] -= values[group].mean()
    total = 0.0
    for block in _linked(groups, clusters):
        sums, count = np.array([left[clusters == cluster].sum() for cluster in sorted(block)]), len(block)
        total += float((sums**2).sum()) * count / (count - 1) if count > 1 else 0.0
    return total / len(values) ** 2
