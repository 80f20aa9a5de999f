"""WebDataset tars as sources: each video's place and the texts beside it, without reading the videos.

Only headers and the small text members are read, so that a tar in object storage costs kilobytes. Which texts belong to
which video: svd/sources/samples.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, BinaryIO

from svd import storage
from svd.core.errors import UserError
from svd.sources.kinds import VIDEOS, why_not
from svd.sources.samples import Member, samples_of

log = logging.getLogger(__name__)
# A header and the texts that follow it in one request; more would be bytes of videos, which aren't needed here.
BLOCK = 16 << 10
MOST_TEXT = 16 << 20  # bytes of a text member that are read
COMPRESSED = (".tgz", ".tbz", ".tbz2", ".txz", ".tzst", *(f".tar.{kind}" for kind in ("gz", "bz2", "xz", "zst", "lz4")))


@dataclass(frozen=True)
class TarVideo:
    """A video inside a tar: its name there, its place, and the facts from each text that belongs to it.

    header: `header_hash` of its place; it differs when the tar was replaced. skipped: why it isn't taken; empty if it
    is.
    """

    name: str
    offset: int
    size: int
    header: str
    facts: tuple[Mapping[str, Any], ...]
    skipped: str = ""


def read_index(location: str) -> Iterator[TarVideo]:
    """Yield the videos of the tar at `location` (anything that svd.storage reads), in its order.

    Raises UserError that names it when it can't be read, or when a web server does not answer ranged requests.
    """
    videos: dict[int, tuple[tarfile.TarInfo, str]] = {}
    texts: dict[int, Mapping[str, Any]] = {}
    members: list[Member] = []
    try:
        with storage.open_read(location, BLOCK) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for place, info in enumerate(tar):
                suffix = PurePosixPath(info.name).suffix.lower()
                if not info.isfile() or _is_hidden(info.name):
                    continue
                if suffix in VIDEOS or why_not(suffix):
                    videos[place] = info, header_hash(stream, info.offset_data)
                elif suffix in (".txt", ".json"):
                    text = _text(tar.extractfile(info))
                    texts[place] = parse(text) if suffix == ".json" else {"caption": text.strip()}
                members.append(Member(place, info.name, place in videos, place in texts))
    except (OSError, tarfile.TarError) as error:
        reason = str(error).removeprefix(f"{location}: ")
        raise UserError(f"{location}: not a readable tar: {reason}") from None
    samples, lost = samples_of(members)
    if lost:
        log.warning(
            "%s: %d texts, such as %s, belong to no video: several names agree up to their first dot, or one repeats",
            location,
            len(lost),
            lost[0],
        )
    for place, (info, header) in videos.items():
        facts = tuple(texts[text] for text in samples[place])
        kind = why_not(PurePosixPath(info.name).suffix.lower())
        yield TarVideo(info.name, info.offset_data, info.size, header, facts, kind)


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


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
