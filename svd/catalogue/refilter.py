"""Filter a catalogue again, with other thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from svd.catalogue.filters import write_verdicts
from svd.config import FiltersConfig


def refilter(
    folder: Path, config: FiltersConfig, subsets: Mapping[str, FiltersConfig] | None = None
) -> dict[str, float]:
    """Judge an existing curation output again, in place; touches no video and rewrites no score.

    Verdicts, funnel, statistics, plots, contact sheets and report follow, and so do the named `subsets`; without any,
    those that are there stay. Returns the thresholds; raises UserError without a catalogue, or for a subset of an axis
    that has no scores.
    """
    from svd.catalogue.report import write_report
    from svd.catalogue.statistics import write_statistics
    from svd.catalogue.subsets import write_subsets

    if subsets:
        write_subsets(folder, subsets)
    thresholds = write_verdicts(folder, config)
    write_statistics(folder, thresholds)
    # As the stage calls it: outputs/<name>/curation.
    write_report([folder], folder / "report.html", [folder.resolve().parent.name])
    return thresholds
