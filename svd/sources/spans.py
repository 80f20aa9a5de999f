"""Spans of lists: columns that say which seconds of a video a row is about.

Read are `start` and `end` (one clip a row, as InternVid has them), `timestamp` with a list of pairs and `caption` with
a list of as many texts (as Panda-70M has them), and `span_seconds` with one pair. Times are seconds or
[HH:]MM:SS.mmm. Names of columns are read in any case.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any

SPAN = "span_seconds"  # [start, end] or [start]; [] says that the row is about all of it, whatever its other columns
STARTS = ("start", "start_seconds", "start_time", "start_timestamp", "start_sec")
ENDS = ("end", "end_seconds", "end_time", "end_timestamp", "end_sec")
PAIRS = ("timestamp", "timestamps", "spans")
LONGEST_LITERAL = 1 << 20  # characters of a list that is written as text
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)")
_SECONDS = re.compile(r"\d+(?:\.\d*)?|\.\d+")
Seconds = tuple[float, float]


def take(values: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Remove and return the first of the columns `names`, in any case, that has a value: 0 is one, "" is none."""
    written = {name.lower(): name for name in values}
    for name in names:
        column = written.get(name.lower(), "")
        value = values.get(column)
        if value is not None and value is not False and value not in ("", [], {}):
            return values.pop(column)
    return None


def names_a_span(values: Mapping[str, Any]) -> bool:
    """Whether one of the columns could be read as a span's."""
    return any(name.lower() in (SPAN, *STARTS, *ENDS, *PAIRS) for name in values)


def take_spans(values: dict[str, Any]) -> tuple[Seconds, ...]:
    """Remove the columns of spans from a row; return the seconds [start, end) that it is about; (): the whole video.

    A `timestamp` that is no list is a column like others. Raises ValueError for what is no time or no span.
    """
    if SPAN in values:
        pair = values.pop(SPAN)
        return (_pair(as_list(pair)),) if pair else ()
    start, end = take(values, STARTS), take(values, ENDS)
    if start is not None or end is not None:
        return (_pair([0 if start is None else start, *([] if end is None else [end])]),)
    column = next((name for name in values if name.lower() in PAIRS and _is_pairs(as_list(values[name]))), None)
    return tuple(_pair(pair) for pair in as_list(values.pop(column)) or ()) if column else ()


def as_list(value: Any) -> list[Any] | None:
    """Return a list, also one that is written as text, in JSON or as Python writes it; None for anything else.

    as_list("['first', 'second']") == ["first", "second"]
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or not value.strip().startswith("[") or len(value) > LONGEST_LITERAL:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return found if isinstance(found, list) else None
    return None


def _is_pairs(value: list[Any] | None) -> bool:
    return bool(value) and all(isinstance(pair, list | tuple) for pair in value or ())


def _pair(pair: Any) -> Seconds:
    if not isinstance(pair, list | tuple) or len(pair) not in (1, 2):
        raise ValueError(f"{pair!r} is no span; give a start and an end")
    start, end = seconds(pair[0]), seconds(pair[1]) if len(pair) == 2 else math.inf
    if end <= start:
        raise ValueError(f"a span ends at {end:g} s, not after its start at {start:g} s")
    return start, end


def seconds(value: Any) -> float:
    """Read a time in seconds or as [HH:]MM:SS.mmm; raises ValueError for anything else.

    seconds("00:01:02.500") == seconds("1:02,5") == seconds("62.5") == seconds(62.5) == 62.5
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return float(value)
    text = value.strip() if isinstance(value, str) else ""
    if _SECONDS.fullmatch(text):
        return float(text)
    if clock := _CLOCK.fullmatch(text):
        hours, minutes, rest = clock.groups()
        return round(3600 * int(hours or 0) + 60 * int(minutes) + float(rest.replace(",", ".")), 6)
    raise ValueError(f"{value!r} is no time; give seconds or HH:MM:SS.mmm")
