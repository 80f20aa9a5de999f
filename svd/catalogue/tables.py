"""Reading and writing the tables of the catalogue, and the identities of sources and clips.

`clips.parquet` has one row per clip. `verdicts.parquet` and `subsets.parquet` have a row for each of them, with its id
and in the same order; they are narrow, so that filtering again rewrites nothing else. `sources.parquet` has one row per
source, `dropped.parquet` one row per span of a source that is in no clip: nothing is dropped silently. Embeddings, flow
maps and videos lie in files of their own. The row of a clip addresses them: `unit` names the shard of sources it came
from, `shard`, `offset` and `size` the bytes of its mp4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import polars.selectors as cs
import pyarrow as pa
import pyarrow.parquet as pq

from svd.catalogue.axes import axes_by_column
from svd.catalogue.schema import FILTERED, VERSION
from svd.core.errors import UserError
from svd.core.files import atomic_file

HASH_BYTES = 1 << 20
# Rows per row group: the browser reads one group per clip that it shows.
ROW_GROUP = 1 << 14


def clip_id(source_id: str, start_pts: int, end_pts: int) -> str:
    """Return the identity of a clip: 32 hex digits, a hash of the source's content hash and the clip's exact times."""
    return hashlib.blake2b(f"{source_id}:{start_pts}:{end_pts}".encode(), digest_size=16).hexdigest()


def content_hash(path: Path) -> str:
    """Return the identity of a source: the first 32 hex digits of the SHA-256 of its bytes; raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()[:32]


def content_hash_of(path: Path, offset: int, size: int) -> str:
    """Return `content_hash` of `size` bytes at `offset` of a file: a member of a tar."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(offset)
        while size and (block := stream.read(min(size, HASH_BYTES))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()[:32]


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as Parquet, atomically; equal tables give equal bytes."""
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        pq.write_table(table, stream, compression="zstd", row_group_size=1 << 17)


def write_stream(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write tables one after another into one file; memory holds one of them or one row group, whichever is larger."""
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        held, count = list[pa.Table](), 0
        for table in tables:
            held, count = [*held, table], count + len(table)
            if count >= ROW_GROUP:
                whole, full = pa.concat_tables(held), count - count % ROW_GROUP
                writer.write_table(whole.slice(0, full), row_group_size=ROW_GROUP)
                held, count = [whole.slice(full)], count - full
        if count:
            writer.write_table(pa.concat_tables(held))


def write_table_rows(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows (dicts) under `schema`; raises KeyError for a key that the schema lacks, a programming error."""
    for row in rows[:1]:
        if unknown := set(row) - set(schema.names):
            raise KeyError(f"not in the catalogue's schema: {sorted(unknown)}")
    write_table(path, pa.Table.from_pylist([dict(row) for row in rows], schema=schema))


def with_schema(frame: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    """Convert a frame to an Arrow table with exactly the columns and types of `schema`; missing columns are null.

    NaN becomes null as well: a score that a network could not compute must not compare as a high one.
    """
    table = frame.with_columns(cs.float().fill_nan(None)).to_arrow()
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def clips_path(folder: Path) -> Path:
    """Return the path of `clips.parquet` of a curation output, or `folder` itself if it is such a file.

    Raises UserError when there is no catalogue or it has another version.
    """
    path = folder if folder.suffix == ".parquet" else folder / "catalogue" / "clips.parquet"
    if not path.is_file():
        raise UserError(f"{path}: no clip catalogue here; give the output folder of `svd curate`")
    version = (pq.read_schema(path).metadata or {}).get(b"svd.catalogue.version", b"0").decode()
    if version != str(VERSION):
        raise UserError(f"{path}: catalogue version {version}, this program reads {VERSION}; run `svd curate` again")
    return path


def scan_scores(folder: Path) -> pl.LazyFrame:
    """Scan all clips with their scores. Verdicts are included only where `clips.parquet` itself holds them.

    An axis that was added after the catalogue was written has a column of nulls: it is unused, not an error.
    """
    scores = pl.scan_parquet(clips_path(folder))
    known = scores.collect_schema().names()
    return scores.with_columns(pl.lit(None, pl.Float32).alias(name) for name in axes_by_column() if name not in known)


def scan_clips(folder: Path) -> pl.LazyFrame:
    """Scan all clips with scores and verdicts, for catalogues larger than memory.

    Raises UserError when the verdicts are those of other clips.
    """
    scores = scan_scores(folder)
    verdicts = folder / "catalogue" / "verdicts.parquet"
    if not verdicts.is_file():
        return scores
    judged = [name for name, _ in FILTERED]
    return pl.concat([scores.drop(judged, strict=False), _scan_beside(folder, verdicts)], how="horizontal")


def _scan_beside(folder: Path, path: Path) -> pl.LazyFrame:
    """Scan a table with a row for each clip of the catalogue, without the ids; raises UserError for other clips.

    The ids are compared, not joined: that needs no memory. Tables of earlier versions have none, only as many rows.
    """
    clips, table = clips_path(folder), pl.scan_parquet(path)
    same = pq.read_metadata(clips).num_rows == pq.read_metadata(path).num_rows
    if same and "clip_id" in table.collect_schema().names():
        ids = pl.scan_parquet(clips).select("clip_id"), table.select(other="clip_id")
        equal = pl.col("clip_id").eq_missing(pl.col("other")).all()
        same = pl.concat(ids, how="horizontal").select(equal).collect(engine="streaming").item()
    if not same:
        raise UserError(f"{path}: its rows are not the clips of clips.parquet; run `svd refilter {folder}`")
    return table.drop("clip_id", strict=False)


def read_clips(folder: Path, subset: str | None = None) -> pl.DataFrame:
    """Read all clips of a curation output with their verdicts, sorted by source and start.

    subset: a named subset (svd.catalogue.subsets); `keep` then says which clips belong to it. Raises UserError when
    there is no catalogue or no such subset, or when verdicts or subset are those of other clips.
    """
    clips = scan_clips(folder).collect()
    return clips if subset is None else clips.with_columns(subset_column(folder, subset).alias("keep"))


def subset_column(folder: Path, subset: str) -> pl.Series:
    """Read which clips of the catalogue belong to a named subset, (clips,) bool; raises UserError as `read_clips`."""
    path = folder / "catalogue" / "subsets.parquet"
    names = [name for name in pq.read_schema(path).names if name != "clip_id"] if path.is_file() else []
    if subset not in names:
        raise UserError(f"{folder}: no subset '{subset}'; there are: {', '.join(names) or 'none'}")
    return _scan_beside(folder, path).select(subset).collect()[subset]


def read_sources(folder: Path) -> pl.DataFrame:
    """Read all sources of a curation output, usable or not."""
    clips_path(folder)
    return pl.read_parquet(folder / "catalogue" / "sources.parquet")
