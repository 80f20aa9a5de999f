"""Tables for people, as Markdown: our rows and published rows never stand together unmarked."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.results import MEASURED, Row

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


def number(value: float | None, digits: int = 4) -> str:
    """A number for a cell; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}g}"


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table."""
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
    """Measured rows, then published ones under a heading that says so."""
    measured = [row for row in rows if row.source == MEASURED]
    published = [row for row in rows if row.source != MEASURED]
    text = "## Measured here\n\n" + _table(measured)
    if published:
        text += "\n## Published numbers\n\nFrom the paper; other weights, data, protocols and numbers of clips.\n\n"
        text += _table(published)
    return text


def _table(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"
