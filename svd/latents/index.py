"""The rows of a latent cache's `index.parquet`: columns are selected by, rows are read one at a time.

An index of LVD-F has 152 million rows; as Python objects they would take 3 kB each, in every rank. Here a large one
lies in a file that all processes of a machine map into memory (`columns.py`), and so do the positions of the rows that
a training has selected. What is sent to another process is paths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from svd.core.errors import UserError
from svd.core.files import atomic_file
from svd.latents.columns import ORDER, Positions, map_table, node_copy, order_of, read_columns

IN_MEMORY = 1 << 17  # rows; each process decodes a smaller index itself: about 20 MB


class Index:
    """N rows by position, in the order of the file. A row is what Parquet holds, but captions have no `text`.

    order: the positions sorted by sample id, (N,). folder: this machine's copy, None where the columns are in memory.
    Rows may be read in forks of a process.
    """

    def __init__(self, table: pa.Table, order: Positions | None = None, folder: Path | None = None) -> None:
        self.table, self.folder = table, folder
        self.order = order_of(table) if order is None else order
        self._batches = table.to_batches()
        self._ends = np.cumsum([len(batch) for batch in self._batches])

    def __len__(self) -> int:
        return len(self.table)

    def row(self, position: int) -> dict[str, Any]:
        """Read the row at a position in 0 … N - 1; the work doesn't depend on N."""
        number = int(np.searchsorted(self._ends, position, side="right"))
        inside = position - int(self._ends[number]) + len(self._batches[number])
        row: dict[str, Any] = self._batches[number].slice(inside, 1).to_pylist()[0]
        return row

    def values(self, name: str) -> list[str]:
        """List the different values of a column, sorted."""
        return sorted(self.table[name].unique().drop_null().to_pylist())

    @cached_property
    def rows(self) -> Rows:
        """All rows, sorted by sample id."""
        return Rows(self, self.order)


class OpenedIndex(Index):
    """The index of a file, which another process opens again when it gets this object."""

    def __init__(self, path: Path, identity: str | None = None) -> None:
        """Open `path`; raises OSError or ValueError for a file that is missing or damaged.

        identity: of the file as it was when another process opened it; raises UserError when it is another one now.
        """
        self.path, self.identity = path, _identify(path)
        if identity not in (None, self.identity):
            raise UserError(f"{path}: changed while it was used; start the command again")
        if pq.read_metadata(path).num_rows <= IN_MEMORY:
            super().__init__(read_columns(path).read_all())
            return
        folder = node_copy(path, self.identity)
        super().__init__(map_table(folder), np.load(folder / ORDER, mmap_mode="r"), folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenedIndex, (self.path, self.identity)


def _identify(path: Path) -> str:
    """Return a digest of where a file is, its size and when it was written: the name of its copy."""
    found = path.stat()
    told = f"{path.resolve()}/{found.st_size}/{found.st_mtime_ns}"
    return hashlib.sha256(told.encode()).hexdigest()[:24]


class Rows(Sequence[Mapping[str, Any]]):
    """Selected rows of an index in a fixed order, each read when it is asked for. positions: (N,)."""

    def __init__(self, index: Index, positions: Positions) -> None:
        self._index, self.positions = index, _shared(index, positions)

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, number: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, number: slice) -> Rows: ...
    def __getitem__(self, number: int | slice) -> Mapping[str, Any] | Rows:
        """Read a row, or select some by a slice."""
        if isinstance(number, slice):
            return Rows(self._index, np.array(self.positions[number]))
        return self._index.row(int(self.positions[number]))

    def column(self, name: str) -> pl.Series:
        """Return a column of these rows, without those of captions' texts."""
        return self._frame([name])[name]

    def where(self, condition: pl.Expr) -> Rows:
        """Keep the rows that fulfil a condition on their columns, in their order; one that is null doesn't."""
        kept = self._frame(condition.meta.root_names()).select(condition.fill_null(False)).to_series()
        return Rows(self._index, self.positions[kept.to_numpy()])

    def take(self, numbers: Sequence[int]) -> Rows:
        """Select rows by their numbers."""
        return Rows(self._index, self.positions[np.asarray(numbers, np.int64)])

    def _frame(self, names: Sequence[str]) -> pl.DataFrame:
        found = pl.DataFrame(self._index.table.select(list(dict.fromkeys(names))))
        return found[self.positions]

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.positions, np.memmap):
            return _mapped_rows, (self._index, self.positions.filename)
        return Rows, (self._index, self.positions)


def _mapped_rows(index: Index, positions: Path) -> Rows:
    return Rows(index, np.load(positions, mmap_mode="r"))


def _shared(index: Index, positions: Positions) -> Positions:
    """Map many positions from a file beside the copy, which is named by them; processes that select alike share it."""
    if index.folder is None or isinstance(positions, np.memmap) or len(positions) <= IN_MEMORY:
        return positions
    name = hashlib.sha256(np.ascontiguousarray(positions).data).hexdigest()[:24]
    path = index.folder / f"{name}.npy"
    if not path.is_file():
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, positions)
    mapped: Positions = np.load(path, mmap_mode="r")
    return mapped
