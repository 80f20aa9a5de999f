"""The HTML report of one or several catalogues side by side: Tab. 1, funnel, histograms, contact sheets.

The file is self-contained: images are embedded as data URIs.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, select_autoescape

from svd.catalogue import tables
from svd.catalogue.axes import AXES
from svd.catalogue.threshold_changes import POINTS, few_clips_note
from svd.core.errors import UserError
from svd.core.files import write_text

REASONS = 20
YEAR_HOURS = 365.25 * 24
# Tab. 1 of the paper, for comparison only: it describes other data sets, which were never measured here.
PAPER_TABLE = {
    "LVD": ("577M", "11.58", "212.09", "325", "11.09", "yes"),
    "LVD-F": ("152M", "10.53", "50.64", "301", "4.76", "yes"),
    "LVD-10M": ("9.8M", "12.11", "3.76", "335", "1.2", "yes"),
    "LVD-10M-F": ("2.3M", "10.99", "0.78", "320", "1.1", "yes"),
}
ROWS = (
    ("clips", "clips", "{:,}"),
    ("clip_duration_seconds", "clip duration (s)", "{:.2f}"),
    ("total_duration_years", "total duration (years)", "{:.4g}"),
    ("mean_frames", "mean frames", "{:.1f}"),
    ("mean_clips_per_video", "mean clips / video", "{:.2f}"),
    ("motion_annotations", "motion annotations", "{:,}"),
)


@dataclass(frozen=True)
class ReportColumn:
    """The contents of the report about one catalogue."""

    name: str
    all: list[str]
    kept: list[str]
    sources: Mapping[str, int]
    steps: Sequence[Mapping[str, Any]]
    changes: Sequence[Mapping[str, Any]]
    note: str
    cameras: Mapping[str, int]
    unusable: Sequence[Mapping[str, Any]]
    models: Mapping[str, str]
    plots: Mapping[str, str]
    sheets: Mapping[str, str]


def write_report(folders: Sequence[Path], target: Path, names: Sequence[str] | None = None) -> Path:
    """Write one HTML file about curation outputs side by side, titled `names` (default: the folders' names).

    Raises UserError when an output has no catalogue or no statistics.
    """
    labels = list(names or [folder.name for folder in folders])
    columns = [_column(folder, label) for folder, label in zip(folders, labels, strict=True)]
    environment = Environment(loader=PackageLoader("svd.catalogue"), autoescape=select_autoescape())
    page = environment.get_template("report.html").render(
        columns=columns,
        rows=[title for _, title, _ in ROWS],
        paper=PAPER_TABLE,
        plots=sorted({name for column in columns for name in column.plots}),
        axes=[axis.name for axis in AXES],
        points=POINTS,
    )
    write_text(target, page)
    return target


def _column(folder: Path, name: str) -> ReportColumn:
    """Gather what the report shows of one catalogue."""
    tables.clips_path(folder)
    try:
        statistics = json.loads((folder / "statistics.json").read_text())
        funnel = json.loads((folder / "funnel.json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: missing; run `svd refilter {folder}` first") from None
    return ReportColumn(
        name=name,
        all=_cells(statistics["all"]),
        kept=_cells(statistics["kept"]),
        sources=statistics["sources"],
        steps=funnel["steps"],
        changes=statistics.get("changes", []),  # statistics of earlier versions have none
        note=few_clips_note(funnel),
        cameras=statistics["cameras"],
        unusable=_unusable(folder),
        models=json.loads(models.read_text()) if (models := folder / "models.json").is_file() else {},
        plots=_data_uris(folder / "plots", "png"),
        sheets=_data_uris(folder / "contact", "jpg"),
    )


def _cells(values: Mapping[str, Any]) -> list[str]:
    """Format the values of a row of Tab. 1."""
    cells = ["–" if values[key] is None else form.format(values[key]) for key, _, form in ROWS]
    years = [key for key, _, _ in ROWS].index("total_duration_years")
    cells[years] += f" ({values['total_duration_years'] * YEAR_HOURS:,.2f} h)"  # a small set is 0 in years
    return cells


def _unusable(folder: Path) -> list[dict[str, Any]]:
    """Return why sources gave no clip, most frequent reason first: reason, count, and one source as an example."""
    sources = tables.read_sources(folder).filter(pl.col("verdict").is_in(["failed", "skipped", "no-clips"]))
    groups = sources.group_by("reason").agg(pl.len().alias("count"), pl.col("source_uri").min().alias("example"))
    return groups.sort("count", "reason", descending=[True, False]).head(REASONS).to_dicts()


def _data_uris(folder: Path, suffix: str) -> dict[str, str]:
    """Return the images of a folder as data URIs by file name without suffix."""
    kind = {"png": "image/png", "jpg": "image/jpeg"}[suffix]
    return {
        path.stem: f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        for path in sorted(folder.glob(f"*.{suffix}"))
    }
