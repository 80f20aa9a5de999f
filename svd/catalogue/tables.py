"""The clip catalogue: its schema in one place, how it is read and written, and how identities are made.

One row a clip (`clips.parquet`), its verdicts in the same order (`verdicts.parquet`, narrow, so that filtering again
rewrites nothing else), one row a source (`sources.parquet`), one row a span of a source that is in no clip
(`dropped.parquet`): nothing is dropped silently. Embeddings, flow maps and videos lie in files of their own, addressed
by the row: `unit` names the shard of sources it came from, `shard`, `offset` and `size` the bytes of its mp4.
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

from svd.catalogue.schema import VERDICTS_SCHEMA, VERSION
from svd.core.errors import UserError
from svd.core.files import atomic_file

HASH_BYTES = 1 << 20
# Rows of a row group: a page of the browser reads one for every clip that it shows.
ROW_GROUP = 1 << 14


def clip_id(source_id: str, start_pts: int, end_pts: int) -> str:
    """Identity of a clip: 32 hex digits of the source's content hash and the clip's exact times."""
    return hashlib.blake2b(f"{source_id}:{start_pts}:{end_pts}".encode(), digest_size=16).hexdigest()


def content_hash(path: Path) -> str:
    """Identity of a source: the first 32 hex digits of the SHA-256 of its bytes; raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()[:32]


def content_hash_of(path: Path, offset: int, size: int) -> str:
    """As `content_hash`, of `size` bytes at `offset`: a member of a tar."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(offset)
        while size and (block := stream.read(min(size, HASH_BYTES))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()[:32]


def write_table(path: Path, table: pa.Table) -> None:
    """Write Parquet atomically; equal tables are equal bytes."""
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        pq.write_table(table, stream, compression="zstd", row_group_size=1 << 17)


def write_stream(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """As `write_table`, of tables as they come; memory holds one of them or a row group, whichever is more."""
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


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows (dicts) under `schema`; a key that the schema lacks is a programming error and raises KeyError."""
    for row in rows[:1]:
        if unknown := set(row) - set(schema.names):
            raise KeyError(f"not in the catalogue's schema: {sorted(unknown)}")
    write_table(path, pa.Table.from_pylist([dict(row) for row in rows], schema=schema))


def with_schema(frame: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    """`frame` as an Arrow table with exactly the columns and types of `schema`; a missing column becomes null.

    So does a number that is none: a score that a network could not give must not pass for a high one.
    """
    table = frame.with_columns(cs.float().fill_nan(None)).to_arrow()
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def clips_path(folder: Path) -> Path:
    """`clips.parquet` of a curation output (or the file itself); raises UserError when there is none or it is newer."""
    path = folder if folder.suffix == ".parquet" else folder / "catalogue" / "clips.parquet"
    if not path.is_file():
        raise UserError(f"{path}: no clip catalogue here; give the output folder of `svd curate`")
    version = (pq.read_schema(path).metadata or {}).get(b"svd.catalogue.version", b"0").decode()
    if version != str(VERSION):
        raise UserError(f"{path}: catalogue version {version}, this program reads {VERSION}; run `svd curate` again")
    return path


def scan_scores(folder: Path) -> pl.LazyFrame:
    """All clips with their scores, lazily; verdicts only where `clips.parquet` itself holds them."""
    return pl.scan_parquet(clips_path(folder))


def scan_clips(folder: Path) -> pl.LazyFrame:
    """As `read_clips`, lazily, for catalogues larger than memory."""
    scores = scan_scores(folder)
    verdicts = folder / "catalogue" / "verdicts.parquet"
    if not verdicts.is_file():
        return scores
    return pl.concat([scores.drop(VERDICTS_SCHEMA.names, strict=False), pl.scan_parquet(verdicts)], how="horizontal")


def read_clips(folder: Path, subset: str | None = None) -> pl.DataFrame:
    """All clips of a curation output with their verdicts, sorted by source and start.

    subset: a named subset (svd.catalogue.subsets); `keep` then says who belongs to it. Raises UserError when there is
    no catalogue or no such subset.
    """
    clips = scan_clips(folder).collect()
    if subset is None:
        return clips
    path = folder / "catalogue" / "subsets.parquet"
    names = pq.read_schema(path).names if path.is_file() else []
    if subset not in names:
        raise UserError(f"{folder}: no subset '{subset}'; there are: {', '.join(names) or 'none'}")
    return clips.with_columns(pl.read_parquet(path, columns=[subset])[subset].alias("keep"))


def read_sources(folder: Path) -> pl.DataFrame:
    """All sources of a curation output, usable or not."""
    clips_path(folder)
    return pl.read_parquet(folder / "catalogue" / "sources.parquet")
