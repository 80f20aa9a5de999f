"""Statistics of a catalogue: the rows of Tab. 1, the plots of Fig. 2, and what each filter keeps and drops."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from matplotlib.axes import Axes

from svd.catalogue import filters, tables
from svd.catalogue.axes import axes_by_column
from svd.catalogue.contact_sheets import write_contact_sheets
from svd.catalogue.threshold_changes import threshold_changes
from svd.core.files import write_json

YEAR_SECONDS = 365.25 * 24 * 3600
BINS = 60
FILTERED = "after filters"
BLUE, RED, GREY = "#4878a8", "#c03030", "#999999"


def dataset_row(clips: pl.LazyFrame) -> dict[str, float | int | None]:
    """Return a set's row of Tab. 1: number of clips, durations, frames, clips per video, motion annotations."""
    row = (
        clips.select(
            pl.len().alias("clips"),
            pl.col("duration").mean().alias("clip_duration"),
            pl.col("duration").sum().alias("seconds"),
            pl.col("frames").mean().alias("mean_frames"),
            pl.col("source_uri").n_unique().alias("videos"),
            pl.col("motion_score").count().alias("with_motion"),
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )
    return {
        "clips": row["clips"],
        "clip_duration_seconds": row["clip_duration"],
        "total_duration_years": row["seconds"] / YEAR_SECONDS,
        "mean_frames": row["mean_frames"],
        "mean_clips_per_video": row["clips"] / row["videos"] if row["videos"] else None,
        "motion_annotations": row["with_motion"],
    }


def clips_per_video(clips: pl.LazyFrame, sources: pl.DataFrame) -> dict[str, float]:
    """Return the mean number of clips per video (Fig. 2 left): by the sources' own metadata, cut detection, and kept.

    The first is there only when metadata give scenes; it is the mean over the videos that have some.
    """
    every, kept = (
        clips.group_by("source_uri")
        .agg(pl.len().alias("all"), pl.col("keep").sum().alias("kept"))
        .select(pl.col("all").mean(), pl.col("kept").mean())
        .collect(engine="streaming")
        .row(0)
    )
    # Catalogues of earlier versions have no such column.
    known = sources.filter(verdict="ok")["scenes"].drop_nulls() if "scenes" in sources.columns else pl.Series()
    given = {"metadata": float(known.to_numpy().mean())} if len(known) else {}
    return {**given, "cut detection": every or 0.0, FILTERED: kept or 0.0}


def histogram(clips: pl.LazyFrame, column: str, bins: int = BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count all and kept clips per bin of a score, streamed: (bins,), (bins,) and the edges (bins + 1,).

    The outermost thousandth on each side goes into the first and last bin, so that one outlier can't hide the rest.
    Returns empty arrays when no clip has a score.
    """
    value = pl.col(column).cast(pl.Float64)
    low, high = (
        clips.select(value.quantile(0.001).alias("low"), value.quantile(0.999).alias("high"))
        .collect(engine="streaming")
        .row(0)
    )
    if low is None:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    width = (high - low) or 1.0
    place = ((value - low) / width * bins).floor().clip(0, bins - 1).cast(pl.Int32)
    counts = (
        clips.filter(value.is_not_null())
        .group_by(place.alias("bin"))
        .agg(pl.len().alias("all"), pl.col("keep").sum().alias("kept"))
        .collect(engine="streaming")
    )
    every, kept = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
    every[counts["bin"].to_numpy()] = counts["all"].to_numpy()
    kept[counts["bin"].to_numpy()] = counts["kept"].to_numpy()
    return every, kept, np.linspace(low, low + width, bins + 1)


def write_statistics(folder: Path, thresholds: Mapping[str, float]) -> dict[str, Any]:
    """Write `statistics.json`, `plots/*.png` and `contact/*.jpg` of a curation output; return the statistics."""
    clips = tables.scan_clips(folder)
    values = {
        "all": dataset_row(clips),
        "kept": dataset_row(clips.filter(pl.col("keep"))),
        "sources": dict(tables.read_sources(folder)["verdict"].value_counts().sort("verdict").rows()),
        "cameras": dict(clips.group_by("camera").len().sort("camera").collect(engine="streaming").rows()),
        "changes": threshold_changes(clips, thresholds),
    }
    write_json(folder / "statistics.json", values)
    plots = folder / "plots"
    shutil.rmtree(plots, ignore_errors=True)  # those of axes that are no longer filtered by would stay
    plots.mkdir()
    for column, (axis, *_) in axes_by_column().items():
        used = {one.side: thresholds[one.name] for one in axes_by_column()[column] if one.name in thresholds}
        if axis.computed == "known" and not used and column != "duration":  # Fig. 2 has the duration
            continue
        counts = histogram(clips, column)
        if len(counts[0]):
            _plot_scores(plots / f"{axis.name}.png", counts, axis.title, used)
    _plot_bars(plots / "clips_per_video.png", clips_per_video(clips, tables.read_sources(folder)))
    _plot_funnel(plots / "funnel.png", filters.funnel(clips, thresholds))
    write_contact_sheets(folder, thresholds)
    return values


def _save(path: Path, plot: Axes) -> None:
    """Write a plot as PNG and close its figure."""
    figure = plot.get_figure()
    assert figure is not None
    # Without matplotlib's name and version in the file: equal catalogues give equal plots.
    figure.savefig(path, dpi=100, metadata={"Software": None})  # type: ignore[union-attr]
    plt.close(figure)  # type: ignore[arg-type]


def _new_plot(**labels: str) -> Axes:
    """Make an empty plot with labels."""
    _, plot = plt.subplots(figsize=(6, 3), layout="constrained")
    plot.set(**labels)  # type: ignore[arg-type]
    return plot


def _plot_scores(
    path: Path,
    counts: tuple[np.ndarray, np.ndarray, np.ndarray],
    title: str,
    thresholds: Mapping[Literal["min", "max"], float],
) -> None:
    """Plot scores as Fig. 2: histogram of all and kept clips, thresholds by side, what they drop shaded."""
    every, kept, edges = counts
    plot = _new_plot(xlabel=title, ylabel="clips")
    plot.stairs(every, edges, fill=True, color=GREY, alpha=0.6, label="all clips")
    plot.stairs(kept, edges, fill=True, color=BLUE, label="kept after all filters")
    low, high = plot.get_xlim()
    for side, threshold in thresholds.items():
        plot.axvspan(*((low, threshold) if side == "min" else (threshold, high)), color=RED, alpha=0.12)
        plot.axvline(threshold, color=RED, label=f"threshold {threshold:.4g}")
    plot.set_xlim(low, high)
    plot.legend()
    _save(path, plot)


def _plot_bars(path: Path, counts: Mapping[str, float]) -> None:
    """Plot the clips per video (Fig. 2 left)."""
    plot = _new_plot(ylabel="clips a video")
    colours = [BLUE if name == FILTERED else GREY for name in counts]
    bars = plot.bar(list(counts), list(counts.values()), color=colours)
    plot.bar_label(bars, fmt="%.2f")
    _save(path, plot)


def _plot_funnel(path: Path, steps: list[dict[str, Any]]) -> None:
    """Plot the clips that are left after each axis."""
    plot = _new_plot(xlabel="clips left")
    names = [step["step"] if index == 0 else f"− {step['step']}" for index, step in enumerate(steps)]
    bars = plot.barh(names, [step["left"] for step in steps], color=BLUE)
    plot.bar_label(bars)
    plot.invert_yaxis()
    plot.margins(x=0.12)
    _save(path, plot)
