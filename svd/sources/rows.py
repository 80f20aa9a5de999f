"""Rows of a list of sources: CSV, TSV, Parquet, JSON lines, or text with one address per line.

Values keep their types: those of CSV are text (`007` stays `007`), JSON and Parquet have their own. What JSON can't
hold becomes text: times in ISO 8601, bytes as UTF-8 or base64.
"""

from __future__ import annotations

import base64
import csv
import datetime
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from svd.core.errors import UserError

LISTS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")


def read_rows(file: Path, name: str) -> Iterator[dict[str, Any]]:
    """Read the rows of `file`, of the kind that its suffix tells; messages call it `name`. Raises UserError."""
    try:
        for number, row in enumerate(_raw(file), start=1):
            if not isinstance(row, Mapping):
                raise ValueError(f"row {number} is no JSON object")
            if None in row:
                raise ValueError(f"row {number} has more fields than the header")
            yield {str(key): plain(value) for key, value in row.items()}
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: can't be read as a list of sources: {reason}") from None


def _raw(file: Path) -> Iterator[Any]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        for batch in pq.ParquetFile(file).iter_batches(4096):
            yield from batch.to_pylist()
    elif suffix in (".csv", ".tsv"):
        with file.open(newline="", encoding="utf-8-sig") as stream:
            yield from csv.DictReader(stream, delimiter="\t" if suffix == ".tsv" else ",")
    else:
        with file.open(encoding="utf-8-sig") as stream:
            for line in filter(None, map(str.strip, stream)):
                yield json.loads(line) if suffix == ".jsonl" else {"uri": line}


def plain(value: Any) -> Any:
    """Convert `value` to what JSON can hold; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return _bytes(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _bytes(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()
