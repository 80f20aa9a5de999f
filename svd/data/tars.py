"""WebDataset tars as sources: where each video lies, and what the texts beside it say, without reading the videos.

Only headers and the small text members are read, so that a tar in object storage costs kilobytes. As in WebDataset,
members belong together when their names agree up to the first dot of the base name.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from svd import storage
from svd.stage import UserError

VIDEOS = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv"),
    *(".ogv", ".3gp", ".mxf"),
}
# A header and the texts that follow it in one request; more would be bytes of a video that nobody wants here.
BLOCK = 16 << 10
MOST_TEXT = 16 << 20  # bytes of a text member that are read


@dataclass(frozen=True)
class TarVideo:
    """A video inside a tar: its name there, its place, and what the members with the same key say of it."""

    name: str
    offset: int
    size: int
    facts: Mapping[str, Any]


def read_index(location: str) -> Iterator[TarVideo]:
    """The videos of the tar at `location` (a path, s3:// or http(s)), in its order.

    Raises UserError that names it when it can't be read, or when a web server does not answer ranged requests.
    """
    videos: list[tuple[str, tarfile.TarInfo]] = []
    facts: dict[str, dict[str, Any]] = {}
    try:
        with storage.open_read(location, BLOCK) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for info in tar:
                key, suffix = _key(info.name), PurePosixPath(info.name).suffix.lower()
                if not info.isfile() or not key:
                    continue
                if suffix in VIDEOS:
                    videos.append((key, info))
                elif suffix in (".txt", ".json"):
                    text = _text(tar.extractfile(info))
                    facts.setdefault(key, {}).update(parse(text) if suffix == ".json" else {"caption": text.strip()})
    except (OSError, tarfile.TarError) as error:
        reason = str(error).removeprefix(f"{location}: ")
        raise UserError(f"{location}: not a readable tar: {reason}") from None
    for key, info in videos:
        yield TarVideo(info.name, info.offset_data, info.size, facts.get(key, {}))


def _key(name: str) -> str:
    """Folder and base name up to its first dot; "" for a hidden file."""
    folder, _, base = name.rpartition("/")
    stem = base.partition(".")[0]
    return f"{folder}/{stem}" if stem else ""


def _text(member: IO[bytes] | None) -> str:
    return member.read(MOST_TEXT).decode("utf-8", "replace") if member else ""


def parse(text: str | bytes, name: str = "") -> dict[str, Any]:
    """The object of a JSON sidecar; one that isn't any is kept as a note under `sidecar_error`."""
    at = f"{name}: " if name else ""
    try:
        values = json.loads(text)
    except ValueError as error:
        return {"sidecar_error": f"{at}{error}"}
    return values if isinstance(values, dict) else {"sidecar_error": f"{at}not a JSON object"}
