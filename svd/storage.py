"""Files on this machine and objects in S3 behind one interface.

A location is a path, a `file://` URI or `s3://bucket/key`. Endpoint and credentials come from the environment
(`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`), as other tools read them.
Writes are atomic (temporary name and rename; multipart upload that is completed or aborted), the SHA-256 of an object
travels in its metadata and is verified on the way back, and everything around the network is tried again with
exponential backoff and jitter.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from s3transfer.exceptions import RetriesExceededError

from svd.stage import UserError

Location = str | Path
T = TypeVar("T")
PART = 16 << 20
TRANSFER = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=4)
_TRANSIENT_CODES = {
    "InternalError",
    "ServiceUnavailable",
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "500",
    "502",
    "503",
}
_TRANSIENT = (
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
    RetriesExceededError,
)


@dataclass(frozen=True)
class Entry:
    """A file or object: where it is, its size in bytes, and its path relative to the folder that was listed."""

    location: str
    size: int
    relative: str


class Truncated(OSError):
    """What arrived differs from what was sent: fewer bytes, or another checksum."""


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


def join(location: Location, *parts: str) -> str:
    """`location` with path components appended."""
    return "/".join([str(location).rstrip("/"), *(part.strip("/") for part in parts)])


@functools.cache
def client() -> Any:
    """The S3 client of this process; one attempt a call, because `retrying` decides about the next ones."""
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=5,
        read_timeout=30,
        s3={"addressing_style": "path"} if os.environ.get("AWS_ENDPOINT_URL") else {},
    )
    return boto3.client("s3", region_name=os.environ.get("AWS_REGION", "us-east-1"), config=config)


def retrying(action: Callable[[], T], what: str, *, attempts: int = 9, first: float = 0.25, longest: float = 15) -> T:
    """Call `action` until it succeeds, waiting up to `first` * 2^n seconds (full jitter) after transient failures.

    Raises UserError for what another try can't mend (denied, no such bucket, no credentials), FileNotFoundError for
    a missing object, and the last failure when the attempts are used up.
    """
    for attempt in range(attempts):
        try:
            return action()
        except NoCredentialsError:
            raise UserError(f"{what}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        except (*_TRANSIENT, Truncated) as error:
            last: Exception = error
        except ClientError as error:
            last = _classify(error, what)
        if attempt + 1 < attempts:
            time.sleep(random.uniform(0, min(longest, first * 2**attempt)))
    raise last


def _classify(error: ClientError, what: str) -> Exception:
    """The error itself when it may pass; raises for one that won't."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _TRANSIENT_CODES or status >= 500:
        return error
    if code in ("NoSuchKey", "404", "NotFound"):
        raise FileNotFoundError(f"{what}: no such object") from None
    if code == "NoSuchBucket":
        raise UserError(f"{what}: no such bucket; create it or correct the URI") from None
    if status in (401, 403):
        raise UserError(f"{what}: access denied ({code}); check the S3 credentials and the bucket's policy") from None
    raise error


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(location: Location) -> Iterator[Entry]:
    """All files below a folder or prefix, sorted by their relative path."""
    if is_remote(location):
        yield from _list_objects(str(location))
        return
    root = local_path(location)
    for path in sorted((p for p in root.rglob("*") if p.is_file()), key=lambda p: p.relative_to(root).as_posix()):
        yield Entry(str(path), path.stat().st_size, path.relative_to(root).as_posix())


def _list_objects(location: str) -> Iterator[Entry]:
    bucket, prefix = split_uri(location.rstrip("/"))
    prefix = f"{prefix}/" if prefix else ""
    token: dict[str, str] = {}
    while True:
        arguments = {"Bucket": bucket, "Prefix": prefix, **token}
        page = retrying(functools.partial(client().list_objects_v2, **arguments), f"list {location}")
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):
                yield Entry(f"s3://{bucket}/{item['Key']}", item["Size"], item["Key"][len(prefix) :])
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def _head(location: Location) -> dict[str, Any]:
    bucket, key = split_uri(location)
    return retrying(lambda: client().head_object(Bucket=bucket, Key=key), str(location))


def exists(location: Location) -> bool:
    """Whether a file or object (not a folder) is there."""
    if not is_remote(location):
        return local_path(location).is_file()
    try:
        _head(location)
    except FileNotFoundError:
        return False
    return True


def size(location: Location) -> int:
    """Size in bytes; raises FileNotFoundError."""
    return int(_head(location)["ContentLength"]) if is_remote(location) else local_path(location).stat().st_size


def read_range(location: Location, start: int = 0, length: int | None = None) -> bytes:
    """`length` bytes from `start` (to the end without `length`); raises FileNotFoundError, Truncated."""
    if not is_remote(location):
        with local_path(location).open("rb") as stream:
            stream.seek(start)
            return stream.read(-1 if length is None else length)
    if length == 0:
        return b""
    bucket, key = split_uri(location)
    wanted = f"bytes={start}-{'' if length is None else start + length - 1}"

    def fetch() -> bytes:
        response = client().get_object(Bucket=bucket, Key=key, Range=wanted)
        data: bytes = response["Body"].read()
        if len(data) != response["ContentLength"]:
            raise Truncated(f"{location}: {len(data)} of {response['ContentLength']} bytes arrived")
        return data

    return retrying(fetch, str(location))


class RangedReader(io.RawIOBase):
    """A seekable stream over an object; wrap it in `io.BufferedReader`, as `open_read` does."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._size = size(location)
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
        data = read_range(self._location, self._position, length) if length else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_read(location: Location) -> BinaryIO:
    """A seekable binary stream; remote objects are read in ranges of 4 MB."""
    if is_remote(location):
        return io.BufferedReader(RangedReader(str(location)), buffer_size=4 << 20)
    return local_path(location).open("rb")


def download(location: Location, path: Path) -> Path:
    """Bring a file, object or http(s) address to `path`; complete and verified, or not there at all.

    Raises FileNotFoundError, UserError (denied) and Truncated (checksum differs after all attempts).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if is_remote(location):
            retrying(lambda: _download_object(str(location), temporary), str(location))
        elif str(location).startswith(("http://", "https://")):
            with urllib.request.urlopen(str(location), timeout=60) as response, temporary.open("wb") as stream:
                shutil.copyfileobj(response, stream)
        else:
            shutil.copyfile(local_path(location), temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _download_object(location: str, temporary: Path) -> None:
    bucket, key = split_uri(location)
    head = client().head_object(Bucket=bucket, Key=key)
    client().download_file(bucket, key, str(temporary), Config=TRANSFER)
    if temporary.stat().st_size != head["ContentLength"]:
        raise Truncated(f"{location}: {temporary.stat().st_size} of {head['ContentLength']} bytes arrived")
    expected = head.get("Metadata", {}).get("sha256")
    if expected and sha256(temporary) != expected:
        raise Truncated(f"{location}: the SHA-256 differs from the one it was stored with")


def upload(path: Path, location: Location) -> None:
    """Put a file at `location`, all or nothing; large files go in parts, which are aborted when one fails."""
    if not is_remote(location):
        target = local_path(location)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        shutil.copyfile(path, temporary)
        _sync(temporary)
        temporary.replace(target)
        return
    bucket, key = split_uri(location)
    extra = {"Metadata": {"sha256": sha256(path)}}
    retrying(lambda: _put_file(path, bucket, key, extra), str(location))


def _put_file(path: Path, bucket: str, key: str, extra: dict[str, Any]) -> None:
    try:
        client().upload_file(str(path), bucket, key, ExtraArgs=extra, Config=TRANSFER)
    except boto3.exceptions.S3UploadFailedError as error:
        # boto3 hides the cause that decides whether another try can help
        cause = error.__context__
        raise cause if isinstance(cause, BotoCoreError | ClientError) else error from None


def write_bytes(location: Location, data: bytes) -> None:
    """Put `data` at `location`, all or nothing."""
    if is_remote(location):
        bucket, key = split_uri(location)
        digest = hashlib.sha256(data).hexdigest()
        put = functools.partial(client().put_object, Bucket=bucket, Key=key, Body=data, Metadata={"sha256": digest})
        retrying(put, str(location))
        return
    target = local_path(location)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    temporary.write_bytes(data)
    _sync(temporary)
    temporary.replace(target)


def _sync(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def copy(source: Location, target: Location) -> None:
    """Copy within S3 on the server's side, or across through this machine."""
    if is_remote(source) and is_remote(target):
        origin, (bucket, key) = dict(zip(("Bucket", "Key"), split_uri(source), strict=True)), split_uri(target)
        retrying(lambda: client().copy(origin, bucket, key, Config=TRANSFER), f"copy {source}")
    elif is_remote(source):
        download(source, local_path(target))
    else:
        upload(local_path(source), target)


def delete(location: Location) -> None:
    """Remove a file or object; one that is not there is no error."""
    if is_remote(location):
        bucket, key = split_uri(location)
        retrying(lambda: client().delete_object(Bucket=bucket, Key=key), str(location))
    else:
        local_path(location).unlink(missing_ok=True)


def download_tree(location: Location, folder: Path) -> int:
    """Bring a folder or prefix to `folder`; files that are there with the right size are kept. Returns bytes moved."""
    moved = 0
    for entry in list_files(location):
        path = folder / entry.relative
        if not (path.is_file() and path.stat().st_size == entry.size):
            download(entry.location, path)
            moved += entry.size
    return moved


def upload_tree(folder: Path, location: Location) -> int:
    """Put a folder at a prefix and delete what is there and not in the folder. Returns bytes moved."""
    present = {entry.relative: entry for entry in list_files(location)}
    moved = 0
    for entry in list_files(folder):
        upload(Path(entry.location), join(location, entry.relative))
        moved += entry.size
        present.pop(entry.relative, None)
    for stale in present.values():
        delete(stale.location)
    return moved
