"""A large index as Arrow columns in a file that is mapped into memory: one copy a machine, shared by all its processes.

Parquet must be decoded to be read, so a copy of it is made, once for each index, below `$SVD_CACHE/indexes`. It leaves
out the texts of captions, which nothing that reads latents looks at and which would be half of it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from svd.core.disk import is_disk_full
from svd.core.environment import cache_folder
from svd.core.errors import UserError
from svd.core.files import atomic_folder, exclusive

BATCH = 1 << 16  # rows decoded at once, and rows of a batch in the copy
KEPT_DAYS = 30  # after its last use
# Columns whose values repeat, with the type of their numbers.
FEW_VALUES = {"geometry": pa.int16(), "split": pa.int16(), "camera": pa.int16(), "shard": pa.int32()}
CAPTIONS = pa.list_(pa.struct([("captioner", pa.string()), ("row", pa.int32())]))
ROWS, ORDER = "rows.arrow", "order.npy"
Positions = NDArray[np.uint32]


def node_copy(path: Path, identity: str) -> Path:
    """Return this machine's copy of an index, a folder with ROWS and ORDER; the first of several processes makes it.

    identity: names the index at `path` as it is now. Raises UserError where the copy can't be written, and OSError or
    ValueError when the index is damaged.
    """
    folder = cache_folder() / "indexes" / identity
    try:
        if not _is_whole(folder):
            making = folder.with_name(f".{identity}.making")
            with exclusive(making):
                if not _is_whole(folder):
                    _make(path, folder)
                making.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None and not is_disk_full(error):  # Arrow's, about the index
            raise
        raise UserError(
            f"{folder.parent}: no memory-mapped copy of {path} can be written here ({error.strerror or error}); "
            "set SVD_CACHE to a folder of this machine with space"
        ) from None
    with suppress(OSError):  # made by another user
        os.utime(folder / ROWS)
    return folder


def _is_whole(folder: Path) -> bool:
    """Return whether a copy can be opened: one that is being removed, or was when that was killed, lacks a file."""
    return (folder / ROWS).is_file() and (folder / ORDER).is_file()


def _make(path: Path, folder: Path) -> None:
    _remove_unused(folder.parent)
    with atomic_folder(folder) as temporary:
        columns = read_columns(path)
        with pa.OSFile(str(temporary / ROWS), "wb") as file, pa.ipc.new_file(file, columns.schema) as writer:
            for batch in columns:
                writer.write_batch(batch)
        np.save(temporary / ORDER, order_of(map_table(temporary)))


def _remove_unused(folder: Path) -> None:
    """Remove the copies that no process has opened for KEPT_DAYS, and what killed writers left."""
    for rows in folder.glob(f"*/{ROWS}"):
        with suppress(FileNotFoundError):  # another process is faster
            if time.time() - rows.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(rows.parent, ignore_errors=True)


def map_table(folder: Path) -> pa.Table:
    """Map the columns of a copy into memory; nothing is read yet."""
    table: pa.Table = pa.ipc.open_file(pa.memory_map(str(folder / ROWS))).read_all()
    return table


def order_of(table: pa.Table) -> Positions:
    """Return the positions of the rows in the order of their sample ids, (N,)."""
    order: Positions = pc.sort_indices(table["sample_id"]).to_numpy().astype(np.uint32)
    return order


def read_columns(path: Path) -> pa.RecordBatchReader:
    """Read an index batch by batch, without the texts of captions, in types that take little space.

    Memory holds some pages of the file, and the different values of FEW_VALUES. Raises OSError or ValueError for a
    damaged file.
    """
    file = pq.ParquetFile(path, buffer_size=1 << 20)  # else whole row groups stay in memory
    schema = pa.schema([(field.name, _type(field)) for field in file.schema_arrow])
    return pa.RecordBatchReader.from_batches(schema, _read(file, schema))


def _type(field: pa.Field) -> pa.DataType:
    if field.name in FEW_VALUES:
        return pa.dictionary(FEW_VALUES[field.name], pa.string())
    if field.name == "captions":
        return CAPTIONS
    if pa.types.is_int64(field.type):  # rows of a shard and motion buckets, far below 2^31
        return pa.int32()
    text = pa.types.is_large_string(field.type) or pa.types.is_string_view(field.type)
    return pa.string() if text else field.type


def _read(file: pq.ParquetFile, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with file:
        coders = _coders(file)
        leaves = [file.schema.column(number).path for number in range(len(file.schema))]
        for batch in file.iter_batches(BATCH, columns=[name for name in leaves if not name.endswith(".text")]):
            columns = [
                coders[field.name].encode(batch[field.name])
                if field.name in coders
                else batch[field.name].cast(field.type)
                for field in schema
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)


@dataclass(frozen=True)
class _Coder:
    """Numbers for the different values of a column. All batches of a file must have the same `dictionary`."""

    numbers: Mapping[str, int]
    dictionary: pa.Array
    type: pa.DataType

    def encode(self, column: pa.Array) -> pa.DictionaryArray:
        local = column.dictionary_encode()
        numbers = pa.array([self.numbers[value] for value in local.dictionary.to_pylist()], self.type)
        return pa.DictionaryArray.from_arrays(pc.take(numbers, local.indices), self.dictionary)


def _coders(file: pq.ParquetFile) -> dict[str, _Coder]:
    """Read the different values of each column of FEW_VALUES that the file has."""
    found: dict[str, dict[str, int]] = {name: {} for name in FEW_VALUES if name in file.schema_arrow.names}
    for batch in file.iter_batches(BATCH, columns=list(found)):
        for name, values in found.items():
            for value in batch[name].unique().drop_null().to_pylist():
                values.setdefault(value, len(values))
    return {
        name: _Coder(values, pa.array(list(values), pa.string()), FEW_VALUES[name]) for name, values in found.items()
    }
