"""Filters decide which clips of a catalogue are kept, as a pure function of its scores (§3.3, E.2.2).

A filter never touches a video: it reads scores and writes verdicts. Every axis is judged alone and over all clips,
because the paper's thresholds are quantiles of the *unfiltered* set. All verdicts are stored, so a clip that fails two
axes says so. An axis without any score is unused. A clip without a score on a used axis is dropped with that reason,
unless the axis is optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from svd.catalogue import schema, tables
from svd.catalogue.axes import AXES, Axis
from svd.config import FiltersConfig, Threshold
from svd.core.files import atomic_file, write_json


def _quantile(axis: Axis, share: float) -> pl.Expr:
    """Return the threshold that drops `share` of the clips; clips at the threshold are kept."""
    column = pl.col(axis.column)
    if axis.side == "min":
        return column.quantile(share, interpolation="higher")
    return column.quantile(1 - share, interpolation="lower")


def resolve_thresholds(clips: pl.LazyFrame, filters: FiltersConfig) -> dict[str, float]:
    """Return the threshold of each used axis by its name; a quantile becomes a value of the catalogue's scores.

    An axis without any score is left out.
    """
    wanted = {a.name: (a, t) for a in AXES if (t := getattr(filters, a.option)) is not None}
    if not wanted:
        return {}
    values = clips.select(
        *(_value(axis, threshold).cast(pl.Float64).alias(name) for name, (axis, threshold) in wanted.items())
    ).collect(engine="streaming")
    return {name: float(values[name][0]) for name in wanted if values[name][0] is not None}


def _value(axis: Axis, threshold: Threshold) -> pl.Expr:
    """Return the threshold as a number; null where the axis has no score."""
    if threshold.quantile is not None:
        return _quantile(axis, threshold.quantile).cast(pl.Float64).clip(threshold.at_least, threshold.at_most)
    return pl.when(pl.col(axis.column).count() > 0).then(pl.lit(threshold.absolute))


def quantiles(filters: FiltersConfig) -> dict[str, float]:
    """Return the share that each axis drops by quantile, by the axis' name."""
    thresholds = {axis.name: getattr(filters, axis.option) for axis in AXES}
    return {name: one.quantile for name, one in thresholds.items() if one is not None and one.quantile is not None}


def _passes(axis: Axis, threshold: float) -> pl.Expr:
    """Say whether a clip passes an axis; null for a clip without a score on an optional axis."""
    column = pl.col(axis.column).cast(pl.Float64)
    inside = column >= threshold if axis.side == "min" else column <= threshold
    return inside if axis.optional else inside.fill_null(False)


def _explanation(axis: Axis, threshold: float) -> pl.Expr:
    """Say why a clip fails an axis, such as "motion 0.021 < 0.043"; null for a clip that passes."""
    sign = "<" if axis.side == "min" else ">"
    score = pl.col(axis.column).round(4).cast(pl.String)
    text = pl.format(f"{axis.name} {{}} {sign} {threshold:.4g}", score).fill_null(f"{axis.name} not measured")
    return pl.when(~pl.col(f"pass_{axis.name}")).then(text)


def judge_clips(clips: pl.LazyFrame, thresholds: Mapping[str, float]) -> pl.LazyFrame:
    """Add `pass_<axis>`, `verdict` ("kept" or the first axis that fails), `keep` and `reason` to each row."""
    used = [axis for axis in AXES if axis.name in thresholds]
    clips = clips.with_columns(
        *(
            _passes(axis, thresholds[axis.name]).alias(f"pass_{axis.name}")
            if axis in used
            else pl.lit(None, pl.Boolean).alias(f"pass_{axis.name}")
            for axis in AXES
        )
    )
    passed = {axis.name: pl.col(f"pass_{axis.name}").fill_null(True) for axis in used}
    first = pl.coalesce(*(pl.when(~passes).then(pl.lit(name)) for name, passes in passed.items()), pl.lit("kept"))
    reasons = [_explanation(axis, thresholds[axis.name]) for axis in used]
    reason = pl.concat_str(*reasons, separator="; ", ignore_nulls=True) if reasons else pl.lit("")
    keep = pl.all_horizontal(*passed.values()) if passed else pl.lit(True)
    return clips.with_columns(first.alias("verdict"), reason.alias("reason"), keep.alias("keep"))


def apply(clips: pl.LazyFrame, filters: FiltersConfig) -> tuple[pl.LazyFrame, dict[str, float]]:
    """Add the columns of `judge_clips`; return the clips and the thresholds that the filters resolve to on them."""
    thresholds = resolve_thresholds(clips, filters)
    return judge_clips(clips, thresholds), thresholds


def funnel(clips: pl.LazyFrame, thresholds: Mapping[str, float]) -> list[dict[str, str | int | float]]:
    """Count what each axis drops, alone and after the axes before it; one row per axis, in their order."""
    used = [axis for axis in AXES if axis.name in thresholds]
    passed = [pl.col(f"pass_{axis.name}") for axis in used]
    counts = clips.select(
        pl.len().alias("total"),
        *((~p).sum().alias(f"alone_{a.name}") for a, p in zip(used, passed, strict=True)),
        *(
            pl.all_horizontal(*(p.fill_null(True) for p in passed[: i + 1])).sum().alias(f"left_{a.name}")
            for i, a in enumerate(used)
        ),
    ).collect(engine="streaming")
    row = counts.row(0, named=True)
    steps: list[dict[str, str | int | float]] = [{"step": "clips", "left": row["total"], "dropped": 0}]
    left = row["total"]
    for axis in used:
        after = row[f"left_{axis.name}"]
        steps.append(
            {
                "step": axis.name,
                "threshold": thresholds[axis.name],
                "dropped_alone": row[f"alone_{axis.name}"],
                "dropped": left - after,
                "left": after,
            }
        )
        left = after
    return steps


def write_verdicts(folder: Path, config: FiltersConfig) -> dict[str, float]:
    """Judge the catalogue in `folder`: write `catalogue/verdicts.parquet` and `funnel.json`; return the thresholds.

    The catalogue is streamed: memory grows with the scores of one axis at a time, not with captions.
    """
    judged, thresholds = apply(tables.scan_scores(folder), config)
    target = folder / "catalogue" / "verdicts.parquet"
    sink(judged.select(schema.VERDICTS_SCHEMA.names), target)
    steps = funnel(pl.scan_parquet(target), thresholds)
    shares = {axis: share for axis, share in quantiles(config).items() if axis in thresholds}
    write_json(folder / "funnel.json", {"steps": steps, "thresholds": thresholds, "quantiles": shares})
    return thresholds


def sink(frame: pl.LazyFrame, target: Path) -> None:
    """Write a lazy frame as Parquet, streamed and atomic."""
    with atomic_file(target) as temporary:
        frame.sink_parquet(temporary, compression="zstd", row_group_size=1 << 17, engine="streaming")
