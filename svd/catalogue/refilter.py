"""Filtering a catalogue again with other thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from svd.catalogue.filters import write_verdicts
from svd.catalogue.report import write_report
from svd.catalogue.statistics import write_statistics
from svd.catalogue.subsets import write_subsets
from svd.config import FiltersConfig


def renew_verdicts(
    folder: Path, config: FiltersConfig, subsets: Mapping[str, FiltersConfig] | None = None
) -> dict[str, float]:
    """Judge an existing curation output again, in place; no video is touched and no score is rewritten.

    Renews verdicts, funnel, statistics, plots, contact sheets, report and the named `subsets`; without `subsets`, those
    on disk stay. Returns the thresholds by axis. Raises UserError without a catalogue, or for a subset of an axis that
    has no scores.
    """
    if subsets:
        write_subsets(folder, subsets)
    thresholds = write_verdicts(folder, config)
    write_statistics(folder, thresholds)
    # The stage writes outputs/<name>/curation and titles its report with <name>.
    write_report([folder], folder / "report.html", [folder.resolve().parent.name])
    return thresholds
