"""Objects in S3, `s3://bucket/key`: every call is tried again, large objects go in parts that are tried one by one.

A server that is restarted in the middle of a transfer costs the parts that were on their way, not the transfer. An
upload is completed or aborted; the SHA-256 of an object is stored with it and verified when it comes back. Endpoint and
credentials come from the environment, as other tools read them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
)

from svd.core.errors import UserError
from svd.core.files import sha256
from svd.core.retries import Transient, Unreachable, retrying
from svd.storage.backend import Conflict, Entry, Kind, split_uri

T = TypeVar("T")
PART = 8 << 20  # as boto3's transfer manager; an upload holds PART * THREADS in memory, a download CHUNK * THREADS
THREADS = 10
CHUNK = 1 << 20  # larger blocks go back to the system when they are freed, and each page of the next one costs a fault
MOST_PARTS = 10_000
PAGE = 1000
LARGEST_COPY = 5 << 30
_PASSING_CODES = (
    "InternalError",
    "ServiceUnavailable",
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "ConditionalRequestConflict",
)
_DAMAGED_CODES = ("BadDigest", "XAmzContentSHA256Mismatch")  # what arrived is not what was sent
_PASSING = (ConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError)
_SETTINGS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")


class UploadLost(Exception):
    """The server no longer knows a multipart upload that was begun."""


class Replaced(UserError):
    """An object became another one while it was read."""


@dataclass(frozen=True)
class Address:
    """Bucket and key of an object or prefix."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def arguments(self) -> dict[str, str]:
        """As boto3 wants them."""
        return {"Bucket": self.bucket, "Key": self.key}


def client() -> Any:
    """The S3 client for the present environment; one attempt a call, because `call` decides about the next ones."""
    return _client(*(os.environ.get(name) for name in _SETTINGS))


@functools.cache
def _client(endpoint: str | None, s3_endpoint: str | None, _key: str | None, _secret: str | None, region: str) -> Any:
    # boto3 reads address and credentials from the environment itself; the arguments make one client for each
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=5,
        read_timeout=30,
        signature_version="s3v4",  # signed links would use an older one otherwise
        max_pool_connections=2 * THREADS,
        s3={"addressing_style": "path"} if endpoint or s3_endpoint else {},
    )
    return boto3.Session().client("s3", region_name=region or "us-east-1", config=config)


def call(action: Callable[[], T], what: str) -> T:
    """Call `action` until it works (see `svd.core.retries.retrying`).

    Raises UserError for what another try can't mend (denied, no such bucket, no credentials), FileNotFoundError for a
    missing object, UploadLost, and svd.core.retries.Unreachable.
    """

    def attempt() -> T:
        try:
            return action()
        except (NoCredentialsError, PartialCredentialsError):
            raise UserError(f"{what}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        except _PASSING as error:
            raise Transient(str(error)) from error
        except ClientError as error:
            raise _classify(error, what) from error
        except BotoCoreError as error:
            raise UserError(f"{what}: {error}") from error

    return retrying(attempt, what)


def _classify(error: ClientError, what: str) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in (*_PASSING_CODES, *_DAMAGED_CODES) or status >= 500:
        return Transient(f"the server answers {status} {code}")
    if code == "NoSuchUpload":
        return UploadLost(f"{what}: the server lost the upload")
    if code == "NoSuchBucket":
        return UserError(f"{what}: no such bucket; create it or correct the URI")
    if code in ("NoSuchKey", "404", "NotFound"):
        return FileNotFoundError(f"{what}: no such object")
    if status in (401, 403):
        return UserError(f"{what}: access denied ({code}); check the S3 credentials and the bucket's policy")
    if code in ("PreconditionFailed", "412"):
        return Replaced(f"{what}: was replaced while it was read; run the command again")
    return UserError(f"{what}: the server refuses: {status} {code}: {error.response.get('Error', {}).get('Message')}")


def listing(prefix: Address) -> Iterator[tuple[str, int, str]]:
    """(key, size, ETag) of the objects whose keys begin with the prefix, page by page."""
    token: dict[str, str] = {}
    while True:
        arguments = {"Bucket": prefix.bucket, "Prefix": prefix.key, "MaxKeys": PAGE, **token}
        page = call(functools.partial(client().list_objects_v2, **arguments), f"list {prefix}")
        yield from ((item["Key"], int(item["Size"]), str(item["ETag"])) for item in page.get("Contents", []))
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def head(address: Address) -> dict[str, Any]:
    """The object's header; raises FileNotFoundError, and UserError when it is the bucket that is missing."""
    try:
        return call(lambda: client().head_object(**address.arguments()), str(address))
    except FileNotFoundError:
        _require_bucket(address)
        raise


def _require_bucket(address: Address) -> None:
    """A header answer has no body, so a missing bucket looks like a missing object there: ask for the bucket."""
    try:
        call(lambda: client().head_bucket(Bucket=address.bucket), str(address))
    except FileNotFoundError:
        raise UserError(f"{address}: no such bucket; create it or correct the URI") from None


def get_range(address: Address, start: int, length: int | None, etag: str | None = None) -> bytes:
    """`length` bytes from `start` (to the end without `length`) of the object, of exactly the version `etag`."""
    wanted = f"bytes={start}-{'' if length is None else start + length - 1}"
    version = {"IfMatch": etag} if etag else {}

    def fetch() -> bytes:
        response = client().get_object(**address.arguments(), Range=wanted, **version)
        data: bytes = response["Body"].read()
        if len(data) != response["ContentLength"]:
            raise Transient(f"{len(data)} of {response['ContentLength']} bytes arrived")
        return data

    return call(fetch, str(address))


def put_bytes(address: Address, data: bytes) -> None:
    """Store `data`, all or nothing."""
    marks = {"sha256": hashlib.sha256(data).hexdigest()}
    call(lambda: client().put_object(**address.arguments(), Body=data, Metadata=marks), str(address))


def put_if(address: Address, data: bytes, expected: str | None) -> str:
    """Store `data` if the object's ETag is `expected` (None: if there is no object); return the new ETag.

    Raises Conflict otherwise. When the answer to a first try was lost, the second one is refused; then what is stored
    tells whether the first one had been done. What servers really do with the two conditions: docs/stores.md.
    """
    condition = {"IfMatch": expected} if expected else {"IfNoneMatch": "*"}
    digest = hashlib.sha256(data).hexdigest()
    arguments = {**address.arguments(), "Body": data, "Metadata": {"sha256": digest}, **condition}
    try:
        answer = call(lambda: client().put_object(**arguments), str(address))
    except (Replaced, FileNotFoundError):
        with contextlib.suppress(FileNotFoundError):
            about = head(address)
            if _stored_digest(about) == digest:
                return str(about["ETag"])
        raise Conflict(f"{address}: another version is stored there") from None
    return str(answer["ETag"])


def _parts(size: int) -> list[tuple[int, int]]:
    """(start, length) of the parts of an object of `size` bytes."""
    part = max(PART, -(-size // MOST_PARTS))
    return [(start, min(part, size - start)) for start in range(0, size, part)]


def put_file(address: Address, path: Path, digest: str) -> None:
    """Store a file with its SHA-256, all or nothing. Raises UserError when the file changes meanwhile."""
    before = path.stat()
    if before.st_size <= PART:
        put_bytes(address, path.read_bytes())
        return
    retrying(lambda: _put_parts(address, path, before.st_size, digest), str(address))
    if (path.stat().st_size, path.stat().st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        _remove(address)
        raise UserError(f"{path}: was changed while it was sent to {address}; send it again")


def _put_parts(address: Address, path: Path, size: int, digest: str) -> None:
    """One multipart upload; aborted on failure, so that no invisible parts stay behind."""
    created = call(
        lambda: client().create_multipart_upload(**address.arguments(), Metadata={"sha256": digest}), str(address)
    )
    upload = {**address.arguments(), "UploadId": created["UploadId"]}
    try:
        with path.open("rb") as stream, ThreadPoolExecutor(THREADS) as pool:

            def send(item: tuple[int, tuple[int, int]]) -> dict[str, Any]:
                number, (start, length) = item
                data = os.pread(stream.fileno(), length, start)
                answer = call(lambda: client().upload_part(**upload, PartNumber=number, Body=data), str(address))
                return {"PartNumber": number, "ETag": answer["ETag"]}

            parts = list(pool.map(send, enumerate(_parts(size), 1)))
        _complete(address, upload, parts, digest)
    except UploadLost as error:
        raise Transient(str(error)) from error
    except Unreachable:
        raise  # there is nobody to tell; a lifecycle rule of the bucket removes what such a failure leaves behind
    except BaseException:
        _abort(address, upload)
        raise


def _abort(address: Address, upload: dict[str, Any]) -> None:
    with contextlib.suppress(UploadLost, FileNotFoundError):
        call(lambda: client().abort_multipart_upload(**upload), str(address))


def _complete(address: Address, upload: dict[str, Any], parts: list[dict[str, Any]], digest: str) -> None:
    """Finish an upload. When the answer to a first try was lost, the second one finds no upload, but the object."""
    try:
        call(lambda: client().complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}), str(address))
    except UploadLost:
        try:
            stored = _stored_digest(head(address))
        except FileNotFoundError:
            stored = None
        if stored != digest:
            raise


def get_file(address: Address, path: Path) -> bool:
    """Write an object to `path`; returns whether it has the SHA-256 it was stored with (True for one stored without).

    Raises Transient when the object was replaced meanwhile: then all of it must be fetched again.
    """
    about = head(address)
    size, etag, expected = int(about["ContentLength"]), about["ETag"], _stored_digest(about)
    with path.open("wb+") as stream, ThreadPoolExecutor(THREADS) as pool:
        descriptor, digest, buffer = stream.fileno(), hashlib.sha256(), memoryview(bytearray(CHUNK))
        parts = pool.map(lambda span: _get_part(address, span, etag, descriptor), _parts(size))
        synced = pool.submit(os.fsync, descriptor)  # most is on the disk when the last part is hashed
        try:
            for start, length in parts:
                if expected:  # in order, while later parts are on their way
                    _hash_range(digest, descriptor, start, length, buffer)
        except Replaced as error:
            raise Transient(str(error)) from error
        synced.result()
    return not expected or digest.hexdigest() == expected


def _get_part(address: Address, span: tuple[int, int], etag: str, descriptor: int) -> tuple[int, int]:
    """Write (start, length) of the version `etag` to its place in a file, chunk by chunk; returns the span."""
    start, length = span
    wanted = f"bytes={start}-{start + length - 1}"

    def fetch() -> tuple[int, int]:
        body = client().get_object(**address.arguments(), Range=wanted, IfMatch=etag)["Body"]
        position = start
        while data := body.read(CHUNK):
            position += os.pwrite(descriptor, data, position)
        if position != start + length:
            raise Transient(f"{position - start} of {length} bytes arrived")
        return span

    return call(fetch, str(address))


def _hash_range(digest: hashlib._Hash, descriptor: int, start: int, length: int, buffer: memoryview) -> None:
    """Add `length` bytes of a file from `start` to the digest; `buffer` is used again and again."""
    end = start + length
    while start < end and (count := os.preadv(descriptor, [buffer[: end - start]], start)):
        digest.update(buffer[:count])
        start += count


class S3:
    """The backend for objects; see svd.storage.backend.Backend."""

    kind: Kind = "store"

    def list(self, location: str) -> Iterator[Entry]:
        """Yield every object below a prefix; raises UserError when the bucket is missing."""
        bucket, prefix = split_uri(location.rstrip("/"))
        prefix = f"{prefix}/" if prefix else ""
        for key, size, version in listing(Address(bucket, prefix)):
            if not key.endswith("/"):
                yield Entry(f"s3://{bucket}/{key}", size, key[len(prefix) :], version)

    def size(self, location: str) -> int:
        """Return the size in bytes."""
        return int(head(address_of(location))["ContentLength"])

    def version(self, location: str) -> str:
        """Return the ETag."""
        return str(head(address_of(location))["ETag"])

    def stored_sha256(self, location: str) -> str | None:
        """Return the SHA-256 in the object's metadata."""
        return _stored_digest(head(address_of(location)))

    def read(self, location: str, start: int, length: int | None) -> tuple[bytes, str | None]:
        """Read a range of one version, with the SHA-256 of that version."""

        def attempt() -> tuple[bytes, str | None]:
            about = head(address_of(location))
            # an empty range or one behind the end is an error in S3, and no bytes here
            available = max(0, int(about["ContentLength"]) - start)
            wanted = available if length is None else min(length, available)
            try:
                data = get_range(address_of(location), start, wanted, str(about["ETag"])) if wanted else b""
            except Replaced as error:
                raise Transient(str(error)) from error
            return data, _stored_digest(about)

        return retrying(attempt, location)

    def ranges(self, location: str) -> tuple[Callable[[int, int], bytes], int]:
        """Return a reader of the present version; it raises Replaced when that is gone."""
        address = address_of(location)
        about = head(address)
        etag = str(about["ETag"])
        return lambda start, length: get_range(address, start, length, etag), int(about["ContentLength"])

    def fetch(self, location: str, path: Path, most: float, seconds: float) -> bool:
        """Write the object to `path`, in parts; return whether its SHA-256 is the stored one."""
        return retrying(lambda: get_file(address_of(location), path), location)

    def put(self, path: Path, location: str) -> None:
        """Store a file with its SHA-256; raises UserError when it changes meanwhile."""
        put_file(address_of(location), path, sha256(path))

    def write(self, location: str, data: bytes) -> None:
        """Store bytes with their SHA-256."""
        put_bytes(address_of(location), data)

    def replace(self, location: str, data: bytes, expected: str | None) -> str:
        """Store bytes if the ETag is `expected`."""
        return put_if(address_of(location), data, expected)

    def copy_within(self, source: str, target: str) -> None:
        """Copy on the server's side with the metadata, which a copy in parts would lose otherwise."""
        here, there, what = address_of(source), address_of(target), f"copy {source}"
        about = head(here)
        if int(about["ContentLength"]) <= LARGEST_COPY:
            call(lambda: client().copy_object(**there.arguments(), CopySource=here.arguments()), what)
            return
        extra = {"Metadata": about.get("Metadata", {}), "MetadataDirective": "REPLACE"}
        call(lambda: client().copy(here.arguments(), there.bucket, there.key, ExtraArgs=extra), what)

    def remove(self, location: str) -> None:
        """Remove an object; one that is not there is no error."""
        _remove(address_of(location))

    def share(self, location: str, seconds: int, content_type: str) -> str:
        """Return an http(s) address, signed for `seconds`; servers tell browsers the type."""
        address = address_of(location)
        head(address)
        arguments = {**address.arguments(), "ResponseContentType": content_type}
        return str(client().generate_presigned_url("get_object", Params=arguments, ExpiresIn=seconds))


def address_of(location: str) -> Address:
    """Return the address of `s3://bucket/key`; raises UserError when the bucket is missing."""
    return Address(*split_uri(location))


def _stored_digest(about: dict[str, Any]) -> str | None:
    digest: str | None = about.get("Metadata", {}).get("sha256")
    return digest


def _remove(address: Address) -> None:
    with contextlib.suppress(FileNotFoundError):
        call(lambda: client().delete_object(**address.arguments()), str(address))
