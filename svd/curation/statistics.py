"""Statistics of a catalogue: the rows of Tab. 1, the histograms of Fig. 2, and what each filter keeps and drops."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import polars as pl

from svd.config import FiltersConfig
from svd.curation import catalog, filters
from svd.stage import write_json

YEAR_SECONDS = 365.25 * 24 * 3600


def table(clips: pl.LazyFrame) -> dict[str, float | int | None]:
    """The rows of Tab. 1 for a set of clips: clips, mean and total duration, frames, clips a video."""
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


def write_statistics(folder: Path, config: FiltersConfig) -> None:
    """Write `statistics.json` and `plots/` of a curation output in place."""
    clips = catalog.scan_clips(folder)
    write_json(folder / "statistics.json", {"all": table(clips), "kept": table(clips.filter(pl.col("keep")))})
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    thresholds = filters.resolve(clips, config)
    for axis in filters.AXES:
        values = clips.select(pl.col(axis.column)).drop_nulls().collect().to_series().to_numpy()
        if len(values):
            plot_histogram(plots / f"{axis.name}.png", values, axis, thresholds.get(axis.name))


def plot_histogram(path: Path, values: np.ndarray, axis: filters.Axis, threshold: float | None) -> None:
    """Histogram of an axis with the threshold drawn in and the dropped side shaded."""
    figure, plot = plt.subplots(figsize=(6, 3), layout="constrained")
    plot.hist(values, bins=60, color="#4878a8")
    if threshold is not None:
        low, high = plot.get_xlim()
        dropped = (low, threshold) if axis.side == "min" else (threshold, high)
        plot.axvspan(*dropped, color="#c03030", alpha=0.15)
        plot.axvline(threshold, color="#c03030", label=f"threshold {threshold:.4g}")
        plot.set_xlim(low, high)
        plot.legend()
    plot.set(xlabel=axis.title, ylabel="clips")
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
