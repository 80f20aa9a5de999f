"""The protocol of a storage backend, and the table of backends by scheme.

A new kind is one file with a class that has the methods of `Backend`, and one row here:

    BACKENDS["gs"] = "svd.storage.google:Google"

The file is imported when a location of its scheme is first used, so that a client library costs nothing before.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from svd.core.errors import UserError

Location = str | Path
Kind = Literal["local", "store", "web"]


@dataclass(frozen=True)
class Entry:
    """A file in a listing: where it is, its size in bytes, and its path relative to the folder that was listed.

    version changes with the content of an object (its ETag); it is empty for a file of this machine.
    """

    location: str
    size: int
    relative: str
    version: str = ""


class Truncated(UserError, OSError):
    """Raised when stored bytes differ from what was put there: fewer bytes, or another checksum."""


class Conflict(Exception):
    """Raised by a conditional write whose condition doesn't hold: another writer was there before."""


class Backend(Protocol):
    """A kind of storage. Locations keep their scheme; the parent folders of a written file come into being by it.

    Methods raise FileNotFoundError for what is missing, UserError (one line) for what is refused, and
    svd.core.retries.Unreachable for a server that does not answer in all attempts.
    """

    kind: Kind
    """local: paths of this machine; store: prefixes with objects, listed and written over the network; web: addresses
    with a query, which are only read."""

    def list(self, location: str) -> Iterator[Entry]:
        """Yield every file below a folder or prefix, in any order; none when it does not exist."""

    def size(self, location: str) -> int:
        """Return the size in bytes."""

    def version(self, location: str) -> str:
        """Return a text that changes with the content, such as an ETag."""

    def stored_sha256(self, location: str) -> str | None:
        """Return the SHA-256 that the file was put with; None when nobody noted it."""

    def read(self, location: str, start: int, length: int | None) -> tuple[bytes, str | None]:
        """Read `length` bytes from `start` (None: to the end) of one version, fewer at its end.

        Returns them with the SHA-256 that the whole of this version was put with, None when unknown.
        """

    def ranges(self, location: str) -> tuple[Callable[[int, int], bytes], int]:
        """Return a function that reads (start, length) of one version, and the size of that version in bytes."""

    def fetch(self, location: str, path: Path, most: float, seconds: float) -> bool:
        """Write the whole to `path`; return whether it has the SHA-256 it was put with (True when unknown).

        most, seconds: bytes and time after which a server that never ends may be given up (UserError).
        """

    def put(self, path: Path, location: str) -> None:
        """Store a file, all or nothing, with its SHA-256 where that can be kept."""

    def write(self, location: str, data: bytes) -> None:
        """Store bytes, all or nothing."""

    def replace(self, location: str, data: bytes, expected: str | None) -> str:
        """Store bytes only if the file's `version` is `expected` (None: it must not exist), and return the new version.

        Of several writers that expect the same version exactly one succeeds; the others get Conflict. `data` must
        differ from all that was stored there before: a writer whose answer was lost finds its success by them.
        """

    def copy_within(self, source: str, target: str) -> None:
        """Copy between two locations of this backend, without a detour over this machine if possible."""

    def remove(self, location: str) -> None:
        """Remove a file; one that is not there is no error."""

    def share(self, location: str, seconds: int, content_type: str) -> str:
        """Return an address that a browser opens without credentials for `seconds`."""


BACKENDS = {
    "": "svd.storage.local:Local",
    "file": "svd.storage.local:Local",
    "s3": "svd.storage.s3:S3",
    "http": "svd.storage.http:Web",
    "https": "svd.storage.http:Web",
}


def scheme_of(location: Location) -> str:
    """Return the scheme of a location, empty for a path: `s3` of `s3://bucket/key`."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", str(location))
    return found[1] if found else ""


def split_uri(location: Location) -> tuple[str, str]:
    """Return bucket and key of `s3://bucket/key`; raises UserError when the bucket is missing."""
    scheme = scheme_of(location)
    bucket, _, key = str(location).removeprefix(f"{scheme}://").partition("/")
    if not bucket:
        raise UserError(f"'{location}': expected {scheme}://bucket/key")
    return bucket, key


def is_known(location: Location) -> bool:
    """Return whether there is a backend for the location; a path without scheme always has one."""
    return scheme_of(location) in BACKENDS


def backend_of(location: Location) -> Backend:
    """Return the backend of a location; raises UserError for an unknown scheme."""
    scheme = scheme_of(location)
    if scheme not in BACKENDS:
        known = ", ".join(f"{name}://" for name in sorted(BACKENDS) if name)
        raise UserError(f"'{location}': nothing here reads {scheme}://; give a path, {known}")
    return _load(BACKENDS[scheme])


@functools.cache
def _load(name: str) -> Backend:
    module, _, kind = name.partition(":")
    backend: Backend = getattr(importlib.import_module(module), kind)()
    return backend
