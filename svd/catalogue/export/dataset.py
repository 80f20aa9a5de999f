"""The export of a catalogue's clips, streamed: each is read from its shard, byte for byte, and written once.

Beside a clip stand a caption and the columns of the catalogue: source, licence, times, scores, verdict. `export.json`
counts clips, bytes and licences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from svd import storage
from svd.catalogue import schema
from svd.catalogue.export.forms import Form, Writer, make_writer
from svd.catalogue.export.selection import Selection, select_clips
from svd.catalogue.filters import sink
from svd.core.errors import UserError
from svd.core.files import atomic_folder, write_json

READ_TOGETHER = 16  # clips in memory; they are read side by side, because a store takes its time for each
INSIDE = {name for name, _ in (*schema.MEMBERS, *schema.FILTERED)} - {"verdict", "reason"}  # mean nothing outside
Row = dict[str, Any]
Locate = Callable[[str], storage.Location]


def export_dataset(
    catalogue: Path,
    locate: Locate,
    target: Path,
    form: Form,
    selection: Selection,
    captioner: str | None = None,
    shard_bytes: int = 1_000_000_000,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the selected clips to the folder `target`, which appears as a whole; return what `export.json` says.

    catalogue: folder with the tables in `catalogue/`. locate: says where a file of the curation output lies, such as
    `shards/clips-000000.tar`. captioner: whose text is a clip's caption; None: the first that has one. shard_bytes:
    size of a WebDataset tar. advance: called with the numbers of clips done and in all. Raises UserError for an
    existing target, an empty selection, and clips that aren't where the catalogue says.
    """
    if target.exists():
        raise UserError(f"{target}: exists already; choose another name or delete it")
    chosen = select_clips(catalogue, selection)
    with atomic_folder(target) as work:
        rows = work / ".rows.parquet"
        sink(chosen, rows)
        table = pq.ParquetFile(rows)
        columns = pa.schema(
            [pa.field("caption", pa.string()), *(field for field in table.schema_arrow if field.name not in INSIDE)]
        )
        with ExitStack() as stack:
            writers = _Writers(stack, lambda split: make_writer(form, work, split, columns, shard_bytes))
            counts = _write(table, locate, writers, captioner, advance)
        rows.unlink()
        about = {"form": form, **counts}
        write_json(work / "export.json", about)
    return about


class _Writers(dict[str, Writer]):
    """The writers of the splits, each made when its first clip comes and closed with `stack`."""

    def __init__(self, stack: ExitStack, make: Callable[[str], Writer]) -> None:
        self._stack, self._make = stack, make

    def __missing__(self, split: str) -> Writer:
        self[split] = self._make(split)
        self._stack.callback(self[split].close)
        return self[split]


def _write(
    table: pq.ParquetFile,
    locate: Locate,
    writers: Mapping[str, Writer],
    captioner: str | None,
    advance: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write all clips of a table of rows; return their counts."""
    if not table.metadata.num_rows:
        raise UserError("the selection has no clips; loosen the filters, or name another subset or verdict")
    clips, licences, size = Counter[str](), Counter[str](), 0
    for done, (row, clip) in enumerate(_read(table, locate), start=1):
        columns = {name: value for name, value in row.items() if name not in INSIDE}
        writers[row["split"]].add({"caption": _caption(row["captions"], captioner), **columns}, clip)
        clips[row["split"]] += 1
        licences[row["licence"] or "unknown"] += 1
        size += len(clip)
        advance(done, table.metadata.num_rows)
    return {"clips": dict(clips), "bytes": size, "licences": dict(licences)}


def _read(table: pq.ParquetFile, locate: Locate) -> Iterator[tuple[Row, bytes]]:
    """Yield the rows of the table with the bytes of their clips."""
    with ThreadPoolExecutor(READ_TOGETHER) as pool:
        for batch in table.iter_batches(READ_TOGETHER):
            rows = batch.to_pylist()
            yield from zip(rows, pool.map(lambda row: _clip(row, locate), rows), strict=True)


def _clip(row: Row, locate: Locate) -> bytes:
    """Read the mp4 of a catalogue row; raises UserError when it isn't there."""
    name = f"shards/{row['shard']}"
    try:
        data = storage.read_range(locate(name), row["offset"], row["size"])
    except FileNotFoundError:
        raise UserError(f"{name}: missing, though the catalogue names it; bring the whole output of curation") from None
    if len(data) != row["size"]:
        raise UserError(f"{name}: ends before the clip {row['clip_id']}; bring the output of curation again")
    return data


def _caption(captions: Sequence[Mapping[str, str]] | None, captioner: str | None) -> str | None:
    """Return the text of a captioner, or the first; None when there is none."""
    texts = (one["text"] for one in captions or () if captioner in (None, one["captioner"]))
    return next(texts, None)
