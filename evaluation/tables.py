"""Tables of scores: CSV for programs, Markdown for people. Published rows always stand apart from measured ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from svd.storage import write_bytes

MEASURED = "measured"
_HEAD = (
    "subject",
    "metric",
    "value",
    "± SE",
    "bias-corrected",
    "kernel (unbiased)",
    "clips",
    "weights",
    "protocol",
    "source",
)


@dataclass(frozen=True)
class Row:
    """One row of a table of Fréchet distances; a number that isn't known is None, and empty in the CSV.

    value: the distance. subject: the clips that were compared with the real ones. source: "measured", or the place of a
    published number.
    """

    dataset: str
    subject: str
    metric: str
    value: float | None
    standard_error: float | None = None
    bias_corrected: float | None = None
    infinity: float | None = None
    mean_term: float | None = None
    covariance_term: float | None = None
    kernel_unbiased: float | None = None
    kernel_standard_error: float | None = None
    real: int | None = None
    generated: int | None = None
    seed: int | None = None
    weights: str = ""
    protocol: str = ""
    source: str = MEASURED


def load_baselines() -> dict[str, Any]:
    """Read the published numbers of `baselines.yaml`."""
    return dict(yaml.safe_load((Path(__file__).parent / "baselines.yaml").read_text()))


def number(value: float | None, digits: int = 4) -> str:
    """Return the text of a number; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}g}"


def cells(row: Row) -> tuple[str, ...]:
    """Return the cells of a row."""
    clips = "–" if row.generated is None else str(row.generated)
    if row.real is not None:
        clips += f" / {row.real} real"
    seed = "" if row.seed is None else f" (seed {row.seed})"
    return (
        f"{row.subject}{seed}",
        row.metric,
        number(row.value),
        number(row.standard_error, 2),
        number(row.bias_corrected),
        number(row.kernel_unbiased),
        clips,
        row.weights,
        row.protocol,
        row.source,
    )


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the measured rows as Markdown, then the published ones under a heading of their own."""
    measured = [row for row in rows if row.source == MEASURED]
    published = [row for row in rows if row.source != MEASURED]
    text = "## Measured here\n\n" + _table(measured)
    if published:
        text += "\n## Published numbers\n\nFrom the paper; other weights, data, protocols and numbers of clips.\n\n"
        text += _table(published)
    return text


def _table(rows: Sequence[Row]) -> str:
    return markdown([dict(zip(_HEAD, cells(row), strict=True)) for row in rows], _HEAD)


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return rows as a Markdown table; a missing value becomes a dash.

    columns: which ones, and their order; None: all that occur, in order of appearance.
    """
    columns = columns_of(rows) if columns is None else columns

    def cell(value: Any) -> str:
        return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(row.get(name)) for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return all columns that occur, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows as CSV, atomically; floats have 7 significant digits, a missing value is empty.

    columns: which ones, and their order; None: all that occur, in order of appearance.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns or columns_of(rows), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{v:.7g}" if isinstance(v, float) else v for name, v in row.items()})
    write_bytes(path, stream.getvalue().encode())


def write_score_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the CSV of an evaluation's rows, with all columns of `Row`."""
    write_csv(path, [asdict(row) for row in rows], [column.name for column in fields(Row)])
