"""An index over a catalogue of millions of clips: scores are in memory, everything else is read for the page shown.

Memory holds 81 bytes per clip: a hash of its id, its place by that, the number of its source, and its scores. Captions
and addresses stay in the file and are read by row group. Verdicts come from `filters`, on the scores in memory.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from svd.catalogue import filters, schema, tables
from svd.catalogue.axes import axes_by_column
from svd.config import FiltersConfig

# Columns of verdicts, and columns from the file, that a page shows of each clip.
JUDGED = ("verdict", "reason", "keep")
SCORES = tuple(axes_by_column())
STORED = (
    "clip_id",
    "source_uri",
    "start_seconds",
    "end_seconds",
    "frames",
    "width",
    "height",
    "codec",
    "method",
    "motion_bucket",
    "camera",
    "captions",
    *SCORES,
)
PLACES = tuple(name for name, _ in schema.MEMBERS)
SORTABLE = ("source_uri", *SCORES)
CACHED_ROWS = 4096
CACHED_ORDERS = 4
BATCH = 1 << 16  # rows per read of the whole file


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of some thresholds. keep: (clips,) bool; drops: how many clips each axis drops on its own."""

    thresholds: Mapping[str, float]
    keep: np.ndarray
    drops: Mapping[str, int]


class ClipIndex:
    """The clips of one curation output by row number of the catalogue; safe to use from several threads.

    The file stays open, so a catalogue that is replaced meanwhile is not mixed with this one.
    """

    def __init__(self, folder: Path) -> None:
        """Open the catalogue and read its scores; raises UserError when there is none."""
        self._file = pq.ParquetFile(tables.clips_path(folder))
        groups = [self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups)]
        self._ends = np.cumsum(groups, dtype=np.int64)
        self._lock = Lock()
        self._rows: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._scores, self._hashes = self._narrow()
        self._by_hash = np.argsort(self._hashes).astype(np.uint32)
        self.order = functools.lru_cache(CACHED_ORDERS)(self._order)
        self.matching = functools.lru_cache(1)(self._matching)

    def __len__(self) -> int:
        return len(self._hashes)

    def _batches(self, *columns: str) -> Iterator[pl.DataFrame]:
        """Yield all rows of some columns in batches; a score that the file lacks is null (see `tables.scan_scores`)."""
        with self._lock:
            for batch in self._file.iter_batches(BATCH, columns=list(columns)):
                if len(batch):
                    frame = pl.DataFrame(pa.Table.from_batches([batch]))
                    absent = (name for name in columns if name not in frame.columns)
                    yield frame.with_columns(pl.lit(None, pl.Float32).alias(name) for name in absent)

    def _narrow(self) -> tuple[pl.DataFrame, np.ndarray]:
        """Read what stays in memory: scores, with the number of each clip's source as `source_uri`, and hashes of ids.

        Clips are sorted by source, so the number of a source sorts as its address does.
        """
        parts, hashes, number, last = [], [np.zeros(0, np.uint64)], 0, None
        for batch in self._batches("clip_id", *SORTABLE):
            uris = batch["source_uri"]
            new = uris.ne_missing(uris.shift(1, fill_value=last)).cast(pl.UInt32).cum_sum() + number
            number, last = int(new[-1]), uris[-1]
            hashes.append(batch["clip_id"].hash().to_numpy())
            parts.append(batch.select(SCORES).with_columns(new.alias("source_uri")))
        empty = pl.DataFrame(schema={name: pl.Float32 for name in SORTABLE})
        return pl.concat(parts, rechunk=True) if parts else empty, np.concatenate(hashes)

    def judge(self, config: FiltersConfig) -> Verdicts:
        """Judge all clips by other thresholds, with the same result as `svd refilter`."""
        thresholds = filters.resolve_thresholds(self._scores.lazy(), config)
        passed = [pl.col(f"pass_{name}") for name in thresholds]
        judged = filters.judge_clips(self._scores.lazy(), thresholds).select("keep", *passed).collect()
        drops = {name: int((~judged[f"pass_{name}"]).sum() or 0) for name in thresholds}
        return Verdicts(thresholds, judged["keep"].to_numpy(), drops)

    def _order(self, column: str, descending: bool) -> np.ndarray:
        """Sort row numbers by a column of SORTABLE; nulls come last, equal values stay in the catalogue's order."""
        place = pl.arg_sort_by(column, descending=descending, nulls_last=True, maintain_order=True)
        return self._scores.select(place).to_series().to_numpy()

    def _matching(self, needle: str) -> np.ndarray:
        """Find clips whose source, camera or captions contain `needle` (lower case), (clips,) bool; reads the file."""
        texts = pl.col("captions").list.eval(pl.element().struct.field("text")).list.join(" ")
        text = pl.concat_str("source_uri", "camera", texts, separator=" ", ignore_nulls=True).str.to_lowercase()
        found = [
            batch.select(text.str.contains(needle, literal=True)).to_series().to_numpy()
            for batch in self._batches("source_uri", "camera", "captions")
        ]
        return np.concatenate([np.zeros(0, bool), *found])

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Read the columns STORED and PLACES of these clips; recently shown rows come from the cache."""
        with self._lock:
            if missing := sorted({n for n in numbers if n not in self._rows}):
                self._rows.update(zip(missing, self._read(np.array(missing)), strict=True))
            found = [self._rows[number] for number in numbers]
            for number in numbers:
                self._rows.move_to_end(number)
            while len(self._rows) > max(CACHED_ROWS, len(numbers)):
                self._rows.popitem(last=False)
        return found

    def _read(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """Read rows by ascending numbers, one row group after another."""
        groups = np.searchsorted(self._ends, numbers, side="right")
        starts = np.concatenate([[0], self._ends])
        rows: list[dict[str, Any]] = []
        for group in np.unique(groups):
            table = self._file.read_row_group(int(group), columns=[*STORED, *PLACES], use_threads=False)
            rows += table.take(pa.array(numbers[groups == group] - starts[group])).to_pylist()
        return rows

    def page(self, numbers: Sequence[int], verdicts: Verdicts) -> list[dict[str, Any]]:
        """Return the columns STORED and JUDGED of these clips, judged by the thresholds of `verdicts`."""
        stored = pa.schema([field for field in schema.SCORES_SCHEMA if field.name in STORED])
        frame = pl.DataFrame(pa.Table.from_pylist(self.rows(numbers), schema=stored))
        judged = filters.judge_clips(frame.lazy(), verdicts.thresholds)
        return judged.select(*STORED, *JUDGED).collect().to_dicts()

    def find(self, clip_id: str) -> dict[str, Any] | None:
        """Return the columns STORED and PLACES of a clip; None when there is no such clip."""
        value = pl.Series([clip_id]).hash()[0]
        first, last = (
            np.searchsorted(self._hashes, np.uint64(value), side, self._by_hash) for side in ("left", "right")
        )
        found = self.rows([int(number) for number in self._by_hash[first:last]])
        return next((row for row in found if row["clip_id"] == clip_id), None)
