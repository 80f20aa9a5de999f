"""Operations on files wherever they lie; svd/storage/backend.py finds the backend of a location.

Writes are atomic (temporary name and rename; a multipart upload that is completed or aborted). The SHA-256 of an object
travels in its metadata and is verified on the way back. Everything around the network is tried again with exponential
backoff and jitter (svd/core/retries.py).
"""

from __future__ import annotations

import hashlib
import io
import math
import mimetypes
import re
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from svd.core.files import atomic_file
from svd.storage.backend import Entry, Location, Truncated, backend_of, is_known
from svd.storage.local import local_path


def is_remote(location: Location) -> bool:
    """Return whether `location` is in a store that is listed and written over the network, such as S3."""
    return is_known(location) and backend_of(location).kind == "store"


def is_address(location: Location) -> bool:
    """Return whether `location` is read over the network: from a store or a web server."""
    return is_known(location) and backend_of(location).kind != "local"


def join(location: Location, *parts: str) -> str:
    """Return `location` with path components appended."""
    return "/".join([str(location).rstrip("/"), *(part.strip("/") for part in parts)])


def sibling(location: Location, name: str) -> str:
    """Return the location of `name` as seen from the folder that holds `location`, for a web address as in a page."""
    if backend_of(location).kind == "web":
        return urllib.parse.urljoin(str(location), name)
    # A prefix keeps its `/` at the end: by it a list tells a folder from a file.
    return join(str(location).rpartition("/")[0], name) + "/" * name.endswith("/")


def file_name(location: Location) -> str:
    """Return the last component of a location; what follows `?` or `#` in a web address is no part of it."""
    text = str(location)
    if is_known(location) and backend_of(location).kind == "web":
        text = re.split(r"[?#]", text)[0]
    return PurePosixPath(text).name


def list_files(location: Location) -> Iterator[Entry]:
    """Yield all files below a folder or prefix, sorted by their relative path; none when it does not exist.

    Raises UserError for a web address, which can't be listed.
    """
    # servers differ in whether "a.b" comes before "a/b"
    yield from sorted(backend_of(location).list(str(location)), key=lambda entry: entry.relative)


def exists(location: Location) -> bool:
    """Return whether a file or object (not a folder) is there."""
    try:
        backend_of(location).size(str(location))
    except FileNotFoundError:
        return False
    return True


def size(location: Location) -> int:
    """Return the size in bytes; raises FileNotFoundError."""
    return backend_of(location).size(str(location))


def version(location: Location) -> str:
    """Return a text that changes with the content, for an object its ETag; raises FileNotFoundError."""
    return backend_of(location).version(str(location))


def stored_sha256(location: Location) -> str | None:
    """Return the SHA-256 that an object was put with, or that a local file has; None for an object without one."""
    return backend_of(location).stored_sha256(str(location))


def read_range(location: Location, start: int = 0, length: int | None = None) -> bytes:
    """Read `length` bytes from `start` (to the end without `length`), fewer at the end; raises FileNotFoundError."""
    return backend_of(location).read(str(location), start, length)[0]


def read_bytes(location: Location) -> bytes:
    """Read the whole of a small file or object; raises FileNotFoundError, and Truncated for another checksum."""
    data, expected = backend_of(location).read(str(location), 0, None)
    if expected and hashlib.sha256(data).hexdigest() != expected:
        raise Truncated(f"{location}: {len(data)} bytes whose SHA-256 differs from the stored one")
    return data


def ranges(location: Location) -> tuple[Callable[[int, int], bytes], int]:
    """Return a function that reads (start, length) of the present version, from any thread, and the size in bytes.

    The function raises UserError when the file became another one. Raises FileNotFoundError.
    """
    return backend_of(location).ranges(str(location))


class RangedReader(io.RawIOBase):
    """A seekable stream over one version of a file; `open_read` wraps it in a buffer."""

    def __init__(self, location: str) -> None:
        self._fetch, self._size = ranges(location)
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing is read until `readinto`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with one ranged request; return the number of bytes."""
        length = min(len(buffer), max(0, self._size - self._position))
        data = self._fetch(self._position, length) if length else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_read(location: Location, block: int = 4 << 20) -> BinaryIO:
    """Open a seekable binary stream; objects and http(s) addresses are read in ranges of `block` bytes.

    Raises FileNotFoundError, and UserError when a web server does not answer ranged requests.
    """
    if backend_of(location).kind == "local":
        return local_path(location).open("rb")
    return io.BufferedReader(RangedReader(str(location)), buffer_size=block)


def download(location: Location, path: Path, most: float = math.inf, seconds: float = math.inf) -> Path:
    """Bring a file, object or http(s) address to `path`; complete and verified, or not there at all.

    most, seconds: bytes and time after which a transfer from an http(s) address is given up (UserError).
    Raises FileNotFoundError, UserError (denied), Truncated (the checksum differs) and svd.core.retries.Unreachable.
    """
    backend = backend_of(location)
    with atomic_file(path) as temporary:
        # A checksum that differs is tried once more, in case the fault lies on the way.
        if not any(backend.fetch(str(location), temporary, most, seconds) for _ in range(2)):
            count = temporary.stat().st_size
            raise Truncated(f"{location}: {count} bytes whose SHA-256 differs from the stored one")
    return path


def upload(path: Path, location: Location) -> None:
    """Put a file at `location`, all or nothing; large files go in parts, which are aborted when one fails."""
    backend_of(location).put(path, str(location))


def write_bytes(location: Location, data: bytes) -> None:
    """Put `data` at `location`, all or nothing."""
    backend_of(location).write(str(location), data)


def replace(location: Location, data: bytes, expected: str | None) -> str:
    """Put small `data` at `location` if its `version` is `expected` (None: nothing is there); return the new version.

    This is an atomic compare-and-swap for leases and pointers: of several writers exactly one succeeds. Raises
    svd.storage.Conflict when another version is there, UserError where writing is impossible.
    """
    return backend_of(location).replace(str(location), data, expected)


def copy(source: Location, target: Location) -> None:
    """Copy a file: within one kind of storage directly, else across through this machine."""
    here, there = backend_of(source), backend_of(target)
    if here is there:
        here.copy_within(str(source), str(target))
    elif here.kind == "local":
        upload(local_path(source), target)
    elif there.kind == "local":
        download(source, local_path(target))
    else:
        with tempfile.TemporaryDirectory() as folder:
            upload(download(source, Path(folder) / "file"), target)


def delete(location: Location) -> None:
    """Remove a file or object; one that is not there is no error."""
    backend_of(location).remove(str(location))


def link(location: Location, seconds: int = 24 * 3600, name: str = "") -> str:
    """Return an address that a browser opens: `file://`, or for an object a signed one, valid for `seconds`.

    name: the file's name where the location doesn't end in it; it tells browsers the type. Raises FileNotFoundError.
    """
    kind = mimetypes.guess_type(name or str(location))[0] or "application/octet-stream"
    return backend_of(location).share(str(location), seconds, kind)
