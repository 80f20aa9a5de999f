"""Files on this machine and objects in S3 behind one interface.

A location is a path, a `file://` URI, `s3://bucket/key`, or for reading an http(s) address. Endpoint and
credentials come from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`).
Writes are atomic (temporary name and rename; multipart upload that is completed or aborted), the SHA-256 of an object
travels in its metadata and is verified on the way back, and everything around the network is tried again with
exponential backoff and jitter (svd/storage/s3.py, svd/storage/http.py).
"""

from __future__ import annotations

import hashlib
import io
import math
import mimetypes
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from svd.core.errors import UserError
from svd.core.files import atomic_file
from svd.core.retries import Transient, retrying
from svd.storage import s3
from svd.storage.http import download_address, ranged_address

Location = str | Path


@dataclass(frozen=True)
class Entry:
    """A file or object: where it is, its size in bytes, its path relative to the folder that was listed, and for an
    object its ETag, which changes with its content.
    """

    location: str
    size: int
    relative: str
    version: str = ""


class Truncated(UserError, OSError):
    """What is stored differs from what was put there: fewer bytes, or another checksum."""


def is_remote(location: Location) -> bool:
    """Whether `location` is in S3."""
    return str(location).startswith("s3://")


def local_path(location: Location) -> Path:
    """The path of a local location."""
    return Path(str(location).removeprefix("file://"))


def split_uri(location: Location) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`; raises UserError when the bucket is missing."""
    bucket, _, key = str(location).removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"'{location}': expected s3://bucket/key")
    return bucket, key


def _address(location: Location) -> s3.Address:
    return s3.Address(*split_uri(location))


def join(location: Location, *parts: str) -> str:
    """`location` with path components appended."""
    return "/".join([str(location).rstrip("/"), *(part.strip("/") for part in parts)])


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(location: Location) -> Iterator[Entry]:
    """All files below a folder or prefix, sorted by their relative path; none when it does not exist."""
    if is_remote(location):
        # servers differ in whether "a.b" comes before "a/b"
        yield from sorted(_list_objects(location), key=lambda entry: entry.relative)
        return
    root = local_path(location)
    for path in sorted((p for p in root.rglob("*") if p.is_file()), key=lambda p: p.relative_to(root).as_posix()):
        yield Entry(str(path), path.stat().st_size, path.relative_to(root).as_posix())


def _list_objects(location: Location) -> Iterator[Entry]:
    bucket, prefix = split_uri(str(location).rstrip("/"))
    prefix = f"{prefix}/" if prefix else ""
    for key, size, version in s3.listing(s3.Address(bucket, prefix)):
        if not key.endswith("/"):
            yield Entry(f"s3://{bucket}/{key}", size, key[len(prefix) :], version)


def exists(location: Location) -> bool:
    """Whether a file or object (not a folder) is there."""
    if not is_remote(location):
        return local_path(location).is_file()
    try:
        s3.head(_address(location))
    except FileNotFoundError:
        return False
    return True


def size(location: Location) -> int:
    """Size in bytes; raises FileNotFoundError."""
    if is_remote(location):
        return int(s3.head(_address(location))["ContentLength"])
    return local_path(location).stat().st_size


def version(uri: str) -> str:
    """The ETag of an object, which changes with its content; raises FileNotFoundError."""
    return str(s3.head(_address(uri))["ETag"])


def stored_sha256(location: Location) -> str | None:
    """The SHA-256 that an object was put with, or that a local file has; None for an object without one."""
    if is_remote(location):
        stored: str | None = s3.head(_address(location)).get("Metadata", {}).get("sha256")
        return stored
    return sha256(local_path(location))


def read_range(location: Location, start: int = 0, length: int | None = None) -> bytes:
    """`length` bytes from `start` (to the end without `length`), fewer at the end; raises FileNotFoundError."""
    if not is_remote(location):
        with local_path(location).open("rb") as stream:
            stream.seek(start)
            return stream.read(-1 if length is None else length)
    return _read_object(location, start, length)[0]


def _read_object(location: Location, start: int = 0, length: int | None = None) -> tuple[bytes, str | None]:
    """Bytes of one version of an object, and the SHA-256 that this version was put with."""

    def attempt() -> tuple[bytes, str | None]:
        about = s3.head(_address(location))
        # an empty range or one behind the end is an error in S3, and no bytes here
        available = max(0, int(about["ContentLength"]) - start)
        wanted = available if length is None else min(length, available)
        try:
            data = s3.get_range(_address(location), start, wanted, str(about["ETag"])) if wanted else b""
        except s3.Replaced as error:
            raise Transient(str(error)) from error
        return data, about.get("Metadata", {}).get("sha256")

    return retrying(attempt, str(location))


def read_bytes(location: Location) -> bytes:
    """The whole of a small file or object; raises FileNotFoundError, and Truncated when the checksum differs."""
    if not is_remote(location):
        return read_range(location)
    data, expected = _read_object(location)
    if expected and hashlib.sha256(data).hexdigest() != expected:
        raise Truncated(f"{location}: {len(data)} bytes whose SHA-256 differs from the stored one")
    return data


class RangedReader(io.RawIOBase):
    """A seekable stream over one version of an object or address; `open_read` wraps it in a buffer."""

    def __init__(self, location: str) -> None:
        self._fetch, self._size = _ranges(location)
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing is read until `readinto`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with one ranged request."""
        length = min(len(buffer), max(0, self._size - self._position))
        data = self._fetch(self._position, length) if length else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _ranges(location: str) -> tuple[Callable[[int, int], bytes], int]:
    """What reads (start, length) of one version of an object or address, and its size in bytes."""
    if not is_remote(location):
        return ranged_address(location)
    address = _address(location)
    about = s3.head(address)
    return lambda start, length: s3.get_range(address, start, length, str(about["ETag"])), int(about["ContentLength"])


def open_read(location: Location, block: int = 4 << 20) -> BinaryIO:
    """A seekable binary stream; objects and http(s) addresses are read in ranges of `block` bytes.

    Raises FileNotFoundError, and UserError when a web server does not answer ranged requests.
    """
    if is_remote(location) or str(location).startswith(("http://", "https://")):
        return io.BufferedReader(RangedReader(str(location)), buffer_size=block)
    return local_path(location).open("rb")


def download(location: Location, path: Path, most: float = math.inf, seconds: float = math.inf) -> Path:
    """Bring a file, object or http(s) address to `path`; complete and verified, or not there at all.

    most, seconds: bytes and time after which a transfer from an http(s) address is given up (UserError).
    Raises FileNotFoundError, UserError (denied), Truncated (the checksum differs) and svd.core.retries.Unreachable.
    """
    with atomic_file(path) as temporary:
        if is_remote(location):
            _download_object(location, temporary)
        elif str(location).startswith(("http://", "https://")):
            download_address(str(location), temporary, most, seconds)
        else:
            shutil.copyfile(local_path(location), temporary)
    return path


def _download_object(location: Location, temporary: Path) -> None:
    """Fetch and verify; a checksum that differs is tried once more, in case the fault lies on the way."""
    for _ in range(2):
        if retrying(lambda: s3.get_file(_address(location), temporary), str(location)):
            return
    raise Truncated(f"{location}: {temporary.stat().st_size} bytes whose SHA-256 differs from the stored one")


def upload(path: Path, location: Location) -> None:
    """Put a file at `location`, all or nothing; large files go in parts, which are aborted when one fails."""
    if is_remote(location):
        s3.put_file(_address(location), path, sha256(path))
        return
    with atomic_file(local_path(location)) as temporary:
        shutil.copyfile(path, temporary)


def write_bytes(location: Location, data: bytes) -> None:
    """Put `data` at `location`, all or nothing."""
    if is_remote(location):
        s3.put_bytes(_address(location), data)
        return
    with atomic_file(local_path(location)) as temporary:
        temporary.write_bytes(data)


def copy(source: Location, target: Location) -> None:
    """Copy within S3 on the server's side, or across through this machine."""
    if is_remote(source) and is_remote(target):
        s3.copy(_address(source), _address(target))
    elif is_remote(source):
        download(source, local_path(target))
    else:
        upload(local_path(source), target)


def delete(location: Location) -> None:
    """Remove a file or object; one that is not there is no error."""
    if is_remote(location):
        s3.delete(_address(location))
    else:
        local_path(location).unlink(missing_ok=True)


def link(location: Location, seconds: int = 24 * 3600) -> str:
    """An address that a browser opens: `file://`, or for an object a signed one that is valid for `seconds`.

    Raises FileNotFoundError.
    """
    if is_remote(location):
        kind = mimetypes.guess_type(str(location))[0] or "application/octet-stream"
        return s3.link(_address(location), seconds, kind)
    path = local_path(location).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{location}: no such file")
    return path.as_uri()
