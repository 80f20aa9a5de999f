"""What other thresholds would keep: each axis moved by some points of its share, the other axes as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from svd.catalogue.axes import AXES, Axis

POINTS = (-10, -5, 0, 5, 10)  # percent of the clips with a score on the axis that are dropped more
FEW_CLIPS = 500  # of fewer clips, a quantile's value is a handful of them


def threshold_changes(clips: pl.LazyFrame, thresholds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a row per used axis: its name and what each of POINTS would do, `points`, `threshold`, `kept` of all axes.

    clips: with scores and verdicts. Points 0 are the present threshold. Memory holds one axis at a time.
    """
    used = [axis for axis in AXES if axis.name in thresholds]
    return [{"axis": axis.name, "at": _changes(clips, axis, thresholds[axis.name], used)} for axis in used]


def _changes(clips: pl.LazyFrame, axis: Axis, threshold: float, used: list[Axis]) -> list[dict[str, Any]]:
    others = [pl.col(f"pass_{other.name}").fill_null(True) for other in used if other is not axis]
    passes = pl.all_horizontal(*others) if others else pl.lit(True)
    table = clips.select(pl.col(axis.column).cast(pl.Float64).alias("score"), passes.alias("passes"))
    found = table.collect(engine="streaming")
    without = found["score"].is_null()
    always = int((found["passes"] & without).sum()) if axis.optional else 0
    # Sorted so that the end that is dropped comes first, and lower is worse.
    sign = 1.0 if axis.side == "min" else -1.0
    measured = found.filter(~without)
    scores = np.sort(sign * measured["score"].to_numpy())
    left = np.sort(sign * measured.filter("passes")["score"].to_numpy())
    dropped = np.searchsorted(scores, sign * threshold) / len(scores)
    rows = []
    for points in POINTS:
        share = float(np.clip(dropped + points / 100, 0, 1))
        value = sign * threshold if points == 0 else scores[int(np.ceil(share * (len(scores) - 1)))]
        kept = always + len(left) - int(np.searchsorted(left, value))
        rows.append({"points": points, "threshold": float(sign * value), "kept": kept})
    return rows


def few_clips_note(funnel: Mapping[str, Any]) -> str:
    """Say what quantiles do to a catalogue of fewer than FEW_CLIPS clips; "" for a larger one or without quantiles.

    funnel: the content of `funnel.json`. The thresholds stay what the preset says: which value is right depends on the
    footage and on the models that score it, and a preset must not mean something else on 499 clips than on 501.
    """
    clips, quantiles = funnel["steps"][0]["left"], funnel.get("quantiles", {})
    if not quantiles or clips >= FEW_CLIPS:
        return ""
    shares = ", ".join(f"{100 * share:g} % by {axis}" for axis, share in quantiles.items())
    return (
        f"{clips} clips are few for quantiles ({shares}): these shares are dropped however good the clips are. Give "
        "`absolute` values, or bound a quantile: `at_most` for min_*, `at_least` for max_*"
    )
