"""WebDataset tars as sources: each video's place and the texts beside it, without reading the videos.

Only headers and the small text members are read, so that a tar in object storage costs kilobytes. As in WebDataset,
members belong together when their names agree up to the first dot of the base name.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, BinaryIO

from svd import storage
from svd.core.errors import UserError

VIDEOS = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv"),
    *(".ogv", ".3gp", ".mxf"),
}
# A header and the texts that follow it in one request; more would be bytes of videos, which aren't needed here.
BLOCK = 16 << 10
MOST_TEXT = 16 << 20  # bytes of a text member that are read
COMPRESSED = (".tgz", ".tbz", ".tbz2", ".txz", ".tzst", *(f".tar.{kind}" for kind in ("gz", "bz2", "xz", "zst", "lz4")))


@dataclass(frozen=True)
class TarVideo:
    """A video inside a tar: its name there, its place, and the facts from the members with the same key.

    header: `header_hash` of its place; it differs when the tar was replaced.
    """

    name: str
    offset: int
    size: int
    header: str
    facts: Mapping[str, Any]


def read_index(location: str) -> Iterator[TarVideo]:
    """Yield the videos of the tar at `location` (anything that svd.storage reads), in its order.

    Raises UserError that names it when it can't be read, or when a web server does not answer ranged requests.
    """
    videos: list[tuple[str, tarfile.TarInfo, str]] = []
    facts: dict[str, dict[str, Any]] = {}
    try:
        with storage.open_read(location, BLOCK) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for info in tar:
                key, suffix = _key(info.name), PurePosixPath(info.name).suffix.lower()
                if not info.isfile() or not key:
                    continue
                if suffix in VIDEOS:
                    videos.append((key, info, header_hash(stream, info.offset_data)))
                elif suffix in (".txt", ".json"):
                    text = _text(tar.extractfile(info))
                    facts.setdefault(key, {}).update(parse(text) if suffix == ".json" else {"caption": text.strip()})
    except (OSError, tarfile.TarError) as error:
        reason = str(error).removeprefix(f"{location}: ")
        raise UserError(f"{location}: not a readable tar: {reason}") from None
    for key, info, header in videos:
        yield TarVideo(info.name, info.offset_data, info.size, header, facts.get(key, {}))


def header_hash(stream: BinaryIO, offset: int) -> str:
    """Hash the header (name, size, time) of the member whose bytes begin at `offset`; the stream is left there.

    The header is part of the tar, so that the hash stays the same when the tar is copied or touched.
    """
    stream.seek(offset - tarfile.BLOCKSIZE)
    return hashlib.blake2b(stream.read(tarfile.BLOCKSIZE), digest_size=8).hexdigest()


def refuse_compressed(address: str, name: str) -> None:
    """Raise UserError when `name`, the last part of `address`, is a compressed tar's: it can't be read in parts."""
    if name.lower().endswith(COMPRESSED):
        raise UserError(
            f"sources: '{address}' is a compressed tar, whose videos can't be read in place; decompress it (videos "
            "hardly get smaller by it) and give the .tar"
        )


def _key(name: str) -> str:
    """Return folder and base name up to its first dot; "" for a hidden file."""
    folder, _, base = name.rpartition("/")
    stem = base.partition(".")[0]
    return f"{folder}/{stem}" if stem else ""


def _text(member: IO[bytes] | None) -> str:
    return member.read(MOST_TEXT).decode("utf-8", "replace") if member else ""


def parse(text: str | bytes, name: str = "") -> dict[str, Any]:
    """Parse the object of a JSON sidecar; a broken one is kept as a note under `sidecar_error`."""
    at = f"{name}: " if name else ""
    try:
        values = json.loads(text)
    except ValueError as error:
        return {"sidecar_error": f"{at}{error}"}
    return values if isinstance(values, dict) else {"sidecar_error": f"{at}not a JSON object"}
