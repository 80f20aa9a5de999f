"""The videos behind what the user names, as one list of `Source` whatever the input is.

Inputs: folders, globs and single files; `s3://` objects and prefixes; http(s) addresses; `ytdl:<address>`; lists
(svd/sources/rows.py) with columns uri, caption, licence and any others, which are carried through as metadata; and
WebDataset tars (svd/sources/tars.py), local or remote. Lists and tars inside a folder or prefix are read too, and a
list may name tars, folders, and prefixes that end with `/`; what it names without a scheme is relative to the list. A
file `<name>.json` beside `<name>.mp4` is its sidecar.
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from svd import storage
from svd.core.addresses import public_address, public_values
from svd.core.errors import UserError
from svd.sources.rows import LISTS, read_rows
from svd.sources.tars import VIDEOS, parse, read_index, refuse_compressed

YTDL = "ytdl:"
# Everything else that lies in a folder of videos is taken for a video, so that a broken one gets its row.
NOT_VIDEOS = {
    *(".json", ".jsonl", ".txt", ".md", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".xml", ".html", ".srt", ".vtt"),
    *(".ass", ".nfo", ".sha256", ".md5", ".log", ".py", ".dvc", ".pdf", ".zip", ".gz", ".lock", ".part", ".tmp"),
    *(".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npz", ".npy", ".wav", ".flac"),
}
LISTS_IN_FOLDERS = (".csv", ".jsonl", ".parquet")  # a .txt there is more often a licence than a list
URI_NAMES = ("uri", "url", "path", "video", "video_path", "video_url", "contentUrl", "file")
CAPTION_NAMES = ("caption", "text", "description", "name", "title")
LICENCE_NAMES = ("licence", "license")
PRIVATE = "credentials_left_out"  # the column of a gathered list that says so
log = logging.getLogger(__name__)
_READERS = 16  # small objects read at a time


@dataclass(frozen=True)
class SceneCaption:
    """A caption that came with a source: of the whole source, or of the seconds [start, end)."""

    text: str
    start: float = 0.0
    end: float = float("inf")


@dataclass(frozen=True)
class Source:
    """One raw video. `uri` names it in the catalogue; `path` is where it (or its tar) lies when that is local.

    archive, offset: the tar that holds it, a path or address, and where in it; header: by which a tar is noticed that
    became another one (svd.sources.tars.header_hash); size: its bytes, where they are known. private: credentials were
    left out of uri and archive (svd/core/addresses.py); address: the full address to fetch from, where that is known.
    """

    uri: str
    path: Path | None = None
    split: str = ""
    captions: tuple[SceneCaption, ...] = ()
    licence: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    offset: int | None = None
    size: int | None = None
    archive: str | None = None
    header: str | None = None
    private: bool = False
    address: str | None = field(default=None, repr=False)

    @property
    def origin(self) -> Path | str:
        """Return where its bytes, or the tar with them, are read from; credentials included, so for reading alone."""
        return self.path or self.address or self.archive or self.uri

    @property
    def remote(self) -> bool:
        """True when the bytes must be fetched first."""
        return self.path is None

    @property
    def described(self) -> bool:
        """Whether anything but its place is known."""
        return bool(self.captions or self.licence or self.metadata)


def list_sources(patterns: Iterable[str], root: Path | None = None) -> list[Source]:
    """List all sources behind `patterns`, sorted by uri, each once.

    Of several entries for one place, the first with a caption, licence or metadata is taken. root: local files below it
    get uris relative to it, and their first folder as `split`. Raises UserError that names the pattern when a path does
    not exist, or when a list or tar can't be read. Addresses that only what is left out of them tells apart
    (svd/core/addresses.py) are one place; the log says how many. For example:

        list_sources(["videos", "s3://bucket/raw/", "https://example.org/clip.mp4", "more.csv"])
    """
    found: dict[tuple[str, int | None], Source] = {}
    merged: list[str] = []
    for source in map(_public, itertools.chain.from_iterable(_expand(pattern, root) for pattern in patterns)):
        place = source.uri if source.path is None else os.path.abspath(source.path)
        known = found.setdefault((place, source.offset), source)
        merged += [source.uri] * (known.address != source.address)
        if source.described and not known.described:
            found[place, source.offset] = source
    if merged:
        log.warning(
            "%d addresses differ from others in credentials alone, as far as their parameters' names tell (%s); each "
            "video is taken once",
            len(merged),
            merged[0],
        )
    return sorted((replace(one, uri=printable(one.uri)) for one in found.values()), key=lambda one: one.uri)


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


def printable(text: str) -> str:
    """Escape what is no Unicode (a file name in another encoding, a lone surrogate), so that `text` can be stored."""
    return text.encode("utf-8", "backslashreplace").decode()


def as_row(source: Source) -> dict[str, Any]:
    """Return `source` as a row of a list that means the same wherever the list lies: local paths become absolute."""
    row = {**source.metadata, "uri": source.uri} | ({PRIVATE: True} if source.private else {})
    if source.archive is not None:
        archive = source.archive if source.path is None else str(source.path.absolute())
        row |= {"archive": archive, "offset": source.offset, "size": source.size, "header": source.header}
    elif source.path is not None:
        row["uri"] = str(source.path.absolute())
    whole = [caption for caption in source.captions if caption == SceneCaption(caption.text)]
    if whole:
        row["caption"] = whole[0].text
    if scenes := [_scene(caption) for caption in source.captions if caption not in whole[:1]]:
        row["scenes"] = scenes
    return row | ({"licence": source.licence} if source.licence else {})


def _scene(caption: SceneCaption) -> dict[str, Any]:
    scene: dict[str, Any] = {"caption": caption.text, "start_seconds": caption.start}
    return scene | ({"end_seconds": caption.end} if caption.end < float("inf") else {})


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
        for row in _addressed(read_rows(file, str(file)), str(file)):
            yield from _listed_local(row, file.parent, root, split)
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
        named = replace(tar, uri=f"{tar.uri}#{video.name}", archive=location)
        yield with_sidecar(replace(named, offset=video.offset, size=video.size, header=video.header), video.facts)


def _addressed(rows: Iterable[dict[str, Any]], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the address of each row of the list `name`, and the other columns."""
    for number, row in enumerate(rows, start=1):
        uri = _take(row, URI_NAMES)
        if not isinstance(uri, str):
            columns = ", ".join(URI_NAMES)
            raise UserError(f"{name}: row {number} has no address; expected text in one of the columns {columns}")
        yield uri, row


def _listed_local(row: tuple[str, dict[str, Any]], folder: Path, root: Path | None, split: str) -> Iterator[Source]:
    """Yield the sources that a row of a local list names; they belong to the split whose folder holds the list."""
    uri, values = row
    if must_be_fetched(uri):
        yield from _listed_remote(uri, values, split)
        return
    _refuse_scheme(uri)
    member = _take_member(values)
    refuse_compressed(uri, "" if member else storage.file_name(uri))
    path = folder / storage.local_path(member.get("archive", uri)).expanduser()
    name, own = _name(path, root)
    one = Source(name if root is not None else uri, path, own or split)
    if member:
        found: Iterable[Source] = [replace(one, uri=uri, **member)]
    elif path.is_dir():
        found = _folder(path, root)
    else:
        tar = path.suffix.lower() == ".tar" and path.is_file()
        found = _tar(str(path), replace(one, uri=name)) if tar else [one]
    yield from (with_sidecar(source, values) for source in found)


def _take_member(values: dict[str, Any]) -> dict[str, Any]:
    """Remove and return the place in a tar that `as_row` wrote; empty when there is none."""
    names = {"archive": str, "offset": int, "size": int}
    if not all(isinstance(values.get(name), kind) for name, kind in names.items()):
        return {}
    # Lists of earlier versions have no header.
    return {name: values.pop(name) for name in (*names, "header") if name in values}


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
        for uri, values in _addressed(read_rows(file, location), location):
            yield from _listed_remote(_beside(location, uri), values, "")


def _beside(location: str, uri: str) -> str:
    """Return the address of what a remote list names; it can't name files of this machine."""
    if must_be_fetched(uri):
        return uri
    if "://" in uri:
        raise UserError(f"{location}: '{uri}' can't be read; give s3://, http(s)://, or a name relative to the list")
    return storage.sibling(location, uri)


def _listed_remote(uri: str, values: dict[str, Any], split: str) -> Iterator[Source]:
    """Yield the sources that a row names by address: a tar's, a prefix's (ends with `/`), or else one video."""
    refuse_compressed(uri, storage.file_name(uri))
    private = values.pop(PRIVATE, False) is True
    if member := _take_member(values):
        found: Iterable[Source] = [Source(uri, **member)]
    elif storage.is_remote(uri) and uri.endswith("/"):
        found = _prefix(uri)
    else:
        found = _tar(uri, Source(uri)) if suffix_of(uri) == ".tar" else [Source(uri)]
    yield from (with_sidecar(replace(source, split=split, private=private), values) for source in found)


def with_sidecar(source: Source, values: Mapping[str, Any]) -> Source:
    """Add a sidecar's captions (`caption`; `scenes`: start_seconds, end_seconds, caption), licence and metadata."""
    values = dict(values)
    captions = [SceneCaption(printable(str(text)))] if (text := _take(values, CAPTION_NAMES)) else []
    scenes = values.pop("scenes", [])
    for scene in scenes if isinstance(scenes, list) else []:
        if isinstance(scene, dict) and (text := scene.get("caption")):
            captions.append(SceneCaption(printable(str(text)), *(_seconds(scene, side) for side in ("start", "end"))))
    licence = _take(values, LICENCE_NAMES)
    named = {*URI_NAMES, *CAPTION_NAMES, *LICENCE_NAMES}  # an empty one says nothing
    known = public_values(values)
    return replace(
        source,
        captions=(*source.captions, *captions),
        licence=printable(str(licence)) if licence else source.licence,
        metadata={**source.metadata, **{k: v for k, v in known.items() if v or (v is not None and k not in named)}},
    )


def _seconds(scene: Mapping[str, Any], side: str) -> float:
    value = scene.get(f"{side}_seconds", scene.get(side))
    return float(value) if isinstance(value, int | float) else (0.0 if side == "start" else float("inf"))


def _take(values: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Remove and return the first of `names` that has a value."""
    for name in names:
        if values.get(name):
            return values.pop(name)
    return None
