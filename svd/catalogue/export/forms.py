"""The forms of an export, one writer each. A split is a folder, or the beginning of a tar's name:

webdataset   train-000000.tar, …     KEY.mp4, KEY.json, KEY.txt (the caption)
datasets     train/metadata.parquet  `file_name` first, `caption` second; train/000/KEY.mp4, …
folder       train/000/KEY.mp4, KEY.json, KEY.txt, …
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from svd.catalogue.shards import ShardWriter

Form = Literal["webdataset", "datasets", "folder"]
FOLDER_CLIPS = 10_000  # per folder: more are slow to list, and the hub refuses them
ROW_GROUP = 1000  # rows of metadata.parquet that are in memory


class Writer(Protocol):
    """Writes the clips of one split; `close` is called when all are written."""

    def add(self, row: Mapping[str, Any], clip: bytes) -> None:
        """Write a clip; row: its columns, with `clip_id` and `caption`. clip: its mp4."""
        ...

    def close(self) -> None:
        """Finish the files."""
        ...


def make_writer(form: Form, folder: Path, split: str, columns: pa.Schema, shard_bytes: int) -> Writer:
    """Make the writer of a split; columns: of the rows. shard_bytes: size of a WebDataset tar."""
    if form == "webdataset":
        return TarWriter(folder, split, shard_bytes)
    return VideoFolderWriter(folder / split, columns) if form == "datasets" else FolderWriter(folder / split)


class TarWriter:
    """WebDataset tars: a clip's mp4, its columns as JSON, its caption as text."""

    def __init__(self, folder: Path, split: str, shard_bytes: int) -> None:
        self._tars = ShardWriter(folder, shard_bytes, split, digits=6)

    def add(self, row: Mapping[str, Any], clip: bytes) -> None:
        """Append a sample."""
        self._tars.add(row["clip_id"], {"mp4": clip, **_sidecars(row)})

    def close(self) -> None:
        """Publish the open tar."""
        self._tars.close()


class FolderWriter:
    """A folder with a JSON and a text beside every mp4."""

    def __init__(self, folder: Path) -> None:
        self._places = _Places(folder)

    def add(self, row: Mapping[str, Any], clip: bytes) -> None:
        """Write the files of a clip."""
        path = self._places.next(row["clip_id"])
        path.write_bytes(clip)
        for extension, content in _sidecars(row).items():
            path.with_suffix(f".{extension}").write_bytes(content)

    def close(self) -> None:
        """Do nothing: every file is finished."""


class VideoFolderWriter:
    """A folder as `datasets.load_dataset("videofolder")` reads it: mp4s, and a row for each in metadata.parquet."""

    def __init__(self, folder: Path, columns: pa.Schema) -> None:
        self._folder, self._places = folder, _Places(folder)
        self._columns = columns.insert(0, pa.field("file_name", pa.string()))
        folder.mkdir(parents=True)
        self._table = pq.ParquetWriter(folder / "metadata.parquet", self._columns, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, row: Mapping[str, Any], clip: bytes) -> None:
        """Write a clip; its row follows with those of its row group."""
        path = self._places.next(row["clip_id"])
        path.write_bytes(clip)
        self._rows.append({"file_name": path.relative_to(self._folder).as_posix(), **row})
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Write the last rows and the footer of the table."""
        self._flush()
        self._table.close()

    def _flush(self) -> None:
        if self._rows:
            self._table.write_table(pa.Table.from_pylist(self._rows, schema=self._columns))
        self._rows = []


class _Places:
    """The paths of clips: FOLDER_CLIPS in 000, the next in 001, …"""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def next(self, name: str) -> Path:
        folder = self._folder / f"{self._count // FOLDER_CLIPS:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        self._count += 1
        return folder / f"{name}.mp4"


def _sidecars(row: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the contents of the files beside a clip by their extension."""
    files = {"json": json.dumps(row, sort_keys=True, ensure_ascii=False).encode()}
    return files if row["caption"] is None else {**files, "txt": row["caption"].encode()}
