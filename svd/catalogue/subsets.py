"""Named subsets of one catalogue, and the subsets of the threshold calibration (§3.3, E.2.2).

A subset is a column of booleans beside the catalogue; no clip is copied. The calibration removes the worst 12.5, 25 and
50 % of one axis at a time and leaves the other axes unfiltered. One model is trained on each subset, and the models are
compared by human preference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from svd.catalogue import filters, tables
from svd.catalogue.axes import AXES, OPTIONS
from svd.config import FiltersConfig, Threshold
from svd.core.errors import UserError
from svd.core.files import write_json

REMOVED_SHARES = (0.125, 0.25, 0.5)
UNFILTERED = "unfiltered"


def calibration_subsets(axes: Sequence[str], shares: Sequence[float] = REMOVED_SHARES) -> dict[str, FiltersConfig]:
    """Return the subsets of the threshold calibration: `unfiltered`, and `<axis>-<percent removed>` per axis and share.

    Raises UserError for an unknown axis.
    """
    if unknown := sorted(set(axes) - set(OPTIONS)):
        raise UserError(f"unknown axis {', '.join(unknown)}; known: {', '.join(OPTIONS)}")
    subsets = {UNFILTERED: FiltersConfig()}
    for axis in axes:
        for share in shares:
            threshold = Threshold(quantile=share)
            subsets[f"{axis}-{100 * share:g}"] = FiltersConfig.model_validate({OPTIONS[axis]: threshold})
    return subsets


def write_subsets(folder: Path, subsets: Mapping[str, FiltersConfig]) -> dict[str, dict[str, Any]]:
    """Write `catalogue/subsets.parquet` (`clip_id`, one boolean column per subset, rows as in the catalogue).

    Writes clips, hours, share and thresholds of each subset into `subsets.json` and returns them. Raises UserError for
    a subset of an axis without scores, which would silently be the whole catalogue, and for one named `clip_id`.
    """
    if "clip_id" in subsets:
        raise UserError("subset 'clip_id': this is the column of the clips' ids; give the subset another name")
    scores = tables.scan_scores(folder)
    columns, found = [], dict[str, dict[str, Any]]()
    for name, config in subsets.items():
        judged, thresholds = filters.apply(scores, config)
        wanted = {axis.name for axis in AXES if getattr(config, axis.option) is not None}
        if missing := sorted(wanted - set(thresholds)):
            raise UserError(f"subset '{name}': the catalogue has no scores for {', '.join(missing)}")
        columns.append(judged.select(pl.col("keep").alias(name)).collect(engine="streaming")[name])
        found[name] = {"thresholds": thresholds}
    known = scores.select("clip_id", "duration").collect(engine="streaming")
    for column in columns:
        found[column.name] |= {
            "clips": int(column.sum()),
            "hours": float(known["duration"].filter(column).sum()) / 3600,
            "share": float(column.mean() or 0.0),  # type: ignore[arg-type]
        }
    tables.write_table(folder / "catalogue" / "subsets.parquet", pl.DataFrame([known["clip_id"], *columns]).to_arrow())
    write_json(folder / "subsets.json", found)
    return found
