"""Which clips an export has, and in which split each is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from svd.catalogue import tables
from svd.core.errors import UserError

HASHES = 16**8  # ids of sources are hashes: their first 8 digits are spread evenly over this many numbers


@dataclass(frozen=True)
class Selection:
    """The clips of an export: by default those that the filters keep.

    subset: a named subset instead. verdicts: instead, the clips with one of these verdicts ("kept", or the axis that
    dropped them). hold_out: share of the sources, 0 to 1, whose clips are in the split `test` beside those that the
    catalogue has there; chosen by the sources' content, so an added source moves no other one.
    """

    subset: str | None = None
    verdicts: Sequence[str] = ()
    hold_out: float = 0.0


def select_clips(catalogue: Path, selection: Selection) -> pl.LazyFrame:
    """Return the rows of the selected clips, `split` being "train" or "test".

    Raises UserError for a folder without clips or verdicts, and for a subset or verdict that it doesn't have.
    """
    clips = tables.scan_clips(catalogue)
    if "keep" not in clips.collect_schema().names():
        raise UserError(f"{catalogue}: has no verdicts; run `svd refilter {catalogue}`")
    test = (pl.col("split") == "test").fill_null(False) | _held_out(selection.hold_out)
    split = pl.when(test).then(pl.lit("test")).otherwise(pl.lit("train"))
    return _chosen(clips, catalogue, selection).with_columns(split=split)


def _chosen(clips: pl.LazyFrame, catalogue: Path, selection: Selection) -> pl.LazyFrame:
    if selection.subset and selection.verdicts:
        raise UserError("give a subset or verdicts, not both")
    if selection.subset:
        return clips.filter(tables.subset_column(catalogue, selection.subset))
    if not selection.verdicts:
        return clips.filter("keep")
    found = clips.select(pl.col("verdict").unique().sort()).collect(engine="streaming")["verdict"].to_list()
    if unknown := sorted(set(selection.verdicts) - set(found)):
        raise UserError(f"no clip has the verdict '{unknown[0]}'; there are: {', '.join(found)}")
    return clips.filter(pl.col("verdict").is_in(list(selection.verdicts)))


def _held_out(share: float) -> pl.Expr:
    number = pl.col("source_id").str.slice(0, 8).str.to_integer(base=16, strict=False)
    return (number < share * HASHES).fill_null(False)
