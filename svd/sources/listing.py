"""The videos behind what the user names, as one list of `Source` whatever the input is.

Inputs: folders, globs and single files; `s3://` objects and prefixes; http(s) addresses; `ytdl:<address>`; lists
(svd/sources/rows.py) with columns uri, caption, licence, start and end (svd/sources/spans.py) and any others, which are
carried through as metadata; and WebDataset tars (svd/sources/tars.py), local or remote. Lists and tars inside a folder
or prefix are read too, and a list may name tars, folders, and prefixes that end with `/`; what it names without a
scheme is relative to the list. A file `<name>.json` beside `<name>.mp4` is its sidecar.
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from svd import storage
from svd.core.addresses import public_address
from svd.core.errors import UserError
from svd.sources.facts import URI_NAMES, with_row, with_sidecar
from svd.sources.kinds import LISTS_IN_FOLDERS, NOT_VIDEOS, VIDEOS, why_not
from svd.sources.rows import LISTS, read_rows
from svd.sources.source import PRIVATE, Source, joined, printable
from svd.sources.spans import take
from svd.sources.tars import parse, read_index, refuse_compressed

YTDL = "ytdl:"
log = logging.getLogger(__name__)
_READERS = 16  # small objects read at a time


def list_sources(patterns: Iterable[str], root: Path | None = None) -> list[Source]:
    """List all sources behind `patterns`, sorted by uri, each once; what isn't taken is there too, as `skipped`.

    Entries for one place are joined (svd/sources/source.py). root: local files below it get uris relative to it, and
    their first folder as `split`. Raises UserError that names the pattern when a path does not exist, or when a list or
    tar can't be read. Addresses that only what is left out of them tells apart (svd/core/addresses.py) are one place;
    the log says how many. For example:

        list_sources(["videos", "s3://bucket/raw/", "https://example.org/clip.mp4", "more.csv"])
    """
    found: dict[tuple[str, int | None], list[Source]] = {}
    merged: list[str] = []
    for source in map(_public, itertools.chain.from_iterable(_expand(pattern, root) for pattern in patterns)):
        place = source.uri if source.path is None else os.path.abspath(source.path)
        entries = found.setdefault((place, source.offset), [])
        entries.append(source)
        merged += [source.uri] * (entries[0].address != source.address)
    if merged:
        log.warning(
            "%d addresses differ from others in credentials alone, as far as their parameters' names tell (%s); each "
            "video is taken once",
            len(merged),
            merged[0],
        )
    return _named_apart(_judged(joined(entries)) for entries in found.values())


def _judged(source: Source) -> Source:
    """Say why a source isn't taken, and make its uri storable."""
    reason = source.skipped or ("" if source.archive else why_not(suffix_of(source.uri)))
    return replace(source, uri=printable(source.uri), skipped=reason)


def _named_apart(sources: Iterable[Source]) -> list[Source]:
    """Sort sources by uri; of several with one uri, all but the first get a number: a uri names one source."""
    ordered = sorted(sources, key=lambda one: (one.uri, str(one.path or ""), one.offset or 0))
    taken = {source.uri for source in ordered}
    seen: set[str] = set()
    for place, source in enumerate(ordered):
        if source.uri in seen:
            uri = next(name for n in itertools.count(2) if (name := f"{source.uri} ({n})") not in taken)
            taken.add(uri)
            ordered[place] = source = replace(source, uri=uri)
        seen.add(source.uri)
    return sorted(ordered, key=lambda one: one.uri)


def with_addresses(sources: list[Source], patterns: list[str]) -> list[Source]:
    """Return `sources` with the addresses that were left out, as what the user names in `patterns` tells them today.

    Nothing is read when none was left out. Raises UserError when one isn't named any more.
    """
    missing = {source.uri for source in sources if source.private and source.address is None}
    if not missing:
        return sources
    known = {source.uri: str(source.origin) for source in list_sources(patterns) if source.remote}
    if gone := sorted(missing - known.keys()):
        raise UserError(
            f"sources.paths: no list there names '{gone[0]}' any more, whose address holds credentials and so is kept "
            f"in your list alone ({len(gone)} such); put it back or run the stage `sources` again"
        )
    return [replace(one, address=known[one.uri]) if one.uri in missing else one for one in sources]


def _public(source: Source) -> Source:
    """Take the credentials out of what is written down of a source; a renewed signature leaves it the same source."""
    if not source.remote:
        return source
    full = source.archive or source.uri
    if (shown := public_address(full)) == full:
        return source
    archive = shown if source.archive else None
    return replace(source, uri=public_address(source.uri), archive=archive, private=True, address=full)


def suffix_of(address: str) -> str:
    """Return the suffix of a path or address in lower case; `?…` and `#…` of a web address are no part of it."""
    return PurePosixPath(storage.file_name(address)).suffix.lower()


def must_be_fetched(address: str) -> bool:
    """Return whether what `address` names lies elsewhere: in a store, on a web server, or behind yt-dlp."""
    return address.startswith(YTDL) or storage.is_address(address)


def _expand(pattern: str, root: Path | None) -> Iterator[Source]:
    if must_be_fetched(pattern):
        yield from _expand_remote(pattern)
        return
    _refuse_scheme(pattern)
    path = storage.local_path(pattern).expanduser()
    if path.is_dir():
        yield from _folder(path, root)
    elif os.path.lexists(path):
        yield from _local(path, root, listed=True)
    elif glob.has_magic(str(path)):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise UserError(f"sources: '{pattern}' does not exist: nothing matches; check the pattern")
        for match in matches:
            yield from _expand(match, root)
    else:
        raise UserError(f"sources: '{pattern}' does not exist; give a folder, file, glob, list or address")


def _refuse_scheme(address: str) -> None:
    if not storage.is_known(address):
        scheme = address.partition("://")[0]
        raise UserError(
            f"sources: '{address}': {scheme}:// can't be read; give s3:// (AWS_ENDPOINT_URL names the server, which "
            "may be any that speaks S3), http(s)://, ytdl: or a path"
        )


def _folder(path: Path, root: Path | None) -> Iterator[Source]:
    for file in sorted(p for p in path.rglob("*") if not p.is_dir()):
        if not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield from _local(file, root, listed=False)


def _local(file: Path, root: Path | None, listed: bool) -> Iterator[Source]:
    """Yield the sources in one local file; `listed`: the user named this very file, so a list is read as a list."""
    suffix = file.suffix.lower()
    refuse_compressed(str(file), file.name)
    uri, split = _name(file, root)
    if suffix == ".tar":
        yield from _tar(str(file), Source(uri, file, split))
    elif suffix in (LISTS if listed else LISTS_IN_FOLDERS):
        for entry in _entries(read_rows(file, str(file)), str(file)):
            yield from _listed_local(entry, file.parent, root, split)
    elif suffix not in NOT_VIDEOS:
        yield with_sidecar(Source(uri, file, split), _read_sidecar(file.with_suffix(".json")))


def _name(file: Path, root: Path | None) -> tuple[str, str]:
    if root is not None and file.is_relative_to(root):
        relative = file.relative_to(root)
        return relative.as_posix(), relative.parts[0] if len(relative.parts) > 1 else ""
    return str(file), ""


def _read_sidecar(path: Path) -> dict[str, Any]:
    """Read the sidecar's object; a missing one is empty, and one that can't be read is kept as a note."""
    if not path.is_file():
        return {}
    try:
        return parse(path.read_bytes(), path.name)
    except OSError as error:
        return {"sidecar_error": f"{path.name}: {error}"}


def _tar(location: str, tar: Source) -> Iterator[Source]:
    """Yield the videos of a tar; `tar` is the tar itself as a source."""
    for video in read_index(location):
        named = replace(tar, uri=f"{tar.uri}#{video.name}", archive=location, skipped=video.skipped)
        one = replace(named, offset=video.offset, size=video.size, header=video.header)
        for facts in video.facts:
            one = with_sidecar(one, facts)
        yield one


@dataclass(frozen=True)
class _Entry:
    """A row of a list: the address that it names, its other columns, and where it stands, for messages."""

    uri: str
    values: dict[str, Any]
    at: str

    def describe(self, found: Iterable[Source], one: bool) -> Iterator[Source]:
        """Add what the row says to the sources that it names; one: it names a single video, so may name its spans."""
        for source in found:
            try:
                described = with_row(source, self.values)
            except ValueError as error:
                raise UserError(f"{self.at}: {error}") from None
            if not one and len(described.spans) > len(source.spans):
                raise UserError(f"{self.at}: start and end are given for '{self.uri}', which holds several videos")
            yield described


def _entries(rows: Iterable[dict[str, Any]], name: str) -> Iterator[_Entry]:
    """Yield the rows of the list `name`."""
    for number, row in enumerate(rows, start=1):
        uri = take(row, URI_NAMES)
        if not isinstance(uri, str):
            columns = ", ".join(URI_NAMES)
            raise UserError(f"{name}: row {number} has no address; expected text in one of the columns {columns}")
        yield _Entry(uri, row, f"{name}: row {number}")


def _listed_local(entry: _Entry, folder: Path, root: Path | None, split: str) -> Iterator[Source]:
    """Yield the sources that a row of a local list names; they belong to the split whose folder holds the list."""
    uri = entry.uri
    if must_be_fetched(uri):
        yield from _listed_remote(entry, split)
        return
    _refuse_scheme(uri)
    member = _take_member(entry.values)
    refuse_compressed(uri, "" if member else storage.file_name(uri))
    path = folder / storage.local_path(member.get("archive", uri)).expanduser()
    name, own = _name(path, root)
    one = Source(name if root is not None else uri, path, own or split)
    tar = path.suffix.lower() == ".tar" and path.is_file()
    if member:
        found: Iterable[Source] = [replace(one, uri=uri, **member)]
    elif path.is_dir():
        found = _folder(path, root)
    else:
        found = _tar(str(path), replace(one, uri=name)) if tar else [one]
    yield from entry.describe(found, one=bool(member) or not (tar or path.is_dir()))


def _take_member(values: dict[str, Any]) -> dict[str, Any]:
    """Remove and return the place in a tar that `as_row` wrote; empty when there is none."""
    names = {"archive": str, "offset": int, "size": int}
    if not all(isinstance(values.get(name), kind) for name, kind in names.items()):
        return {}
    # Lists of earlier versions have no header.
    return {name: values.pop(name) for name in (*names, "header", "skipped") if name in values}


def _expand_remote(pattern: str) -> Iterator[Source]:
    suffix = suffix_of(pattern)
    if not storage.is_remote(pattern):
        yield from _object(pattern, suffix, listed=True)
    elif pattern.endswith("/") or not storage.split_uri(pattern)[1]:
        yield from _prefix(pattern)
    elif suffix in VIDEOS or storage.exists(pattern):
        yield from _object(pattern, suffix, listed=True)
    else:
        yield from _prefix(pattern)


def _object(location: str, suffix: str, listed: bool, size: int | None = None) -> Iterator[Source]:
    """Yield the sources in one object or web address; `listed` as in `_local`."""
    refuse_compressed(location, storage.file_name(location))
    if suffix == ".tar":
        yield from _tar(location, Source(location))
    elif suffix in (LISTS if listed else LISTS_IN_FOLDERS):
        yield from _remote_list(location, suffix)
    elif listed or suffix not in NOT_VIDEOS:
        yield Source(location, size=size)


def _prefix(pattern: str) -> Iterator[Source]:
    """Yield everything below a prefix, as in a folder; small objects (sidecars, lists) are read in parallel."""
    entries = [e for e in storage.list_files(pattern) if not any(p.startswith(".") for p in e.relative.split("/"))]
    if not entries:
        raise UserError(f"sources: '{pattern}': no such object, and nothing below such a prefix")
    there = {entry.location for entry in entries}

    def expand(entry: storage.Entry) -> list[Source]:
        suffix = suffix_of(entry.location)
        found = list(_object(entry.location, suffix, listed=False, size=entry.size))
        sidecar = entry.location.removesuffix(entry.location[-len(suffix) :] if suffix else "") + ".json"
        if sidecar not in there or suffix in NOT_VIDEOS | {".tar"}:
            return found
        return [with_sidecar(source, _remote_sidecar(sidecar)) for source in found]

    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(entries), 10_000):
            yield from itertools.chain.from_iterable(pool.map(expand, entries[start : start + 10_000]))


def _remote_sidecar(location: str) -> dict[str, Any]:
    name = location.rpartition("/")[2]
    try:
        return parse(storage.read_bytes(location), name)
    except OSError as error:
        return {"sidecar_error": f"{name}: {error}"}


def _remote_list(location: str, suffix: str) -> Iterator[Source]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"list{suffix}"
        try:
            storage.download(location, file)
        except OSError as error:
            raise UserError(f"sources: the list '{location}' can't be fetched: {error}") from None
        for entry in _entries(read_rows(file, location), location):
            yield from _listed_remote(replace(entry, uri=_beside(location, entry.uri)), "")


def _beside(location: str, uri: str) -> str:
    """Return the address of what a remote list names; it can't name files of this machine."""
    if must_be_fetched(uri):
        return uri
    if "://" in uri:
        raise UserError(f"{location}: '{uri}' can't be read; give s3://, http(s)://, or a name relative to the list")
    return storage.sibling(location, uri)


def _listed_remote(entry: _Entry, split: str) -> Iterator[Source]:
    """Yield the sources that a row names by address: a tar's, a prefix's (ends with `/`), or else one video."""
    uri = entry.uri
    refuse_compressed(uri, storage.file_name(uri))
    private = entry.values.pop(PRIVATE, False) is True
    prefix, tar = storage.is_remote(uri) and uri.endswith("/"), suffix_of(uri) == ".tar"
    if member := _take_member(entry.values):
        found: Iterable[Source] = [Source(uri, **member)]
    elif prefix:
        found = _prefix(uri)
    else:
        found = _tar(uri, Source(uri)) if tar else [Source(uri)]
    placed = (replace(source, split=split, private=private) for source in found)
    yield from entry.describe(placed, one=bool(member) or not (prefix or tar))
