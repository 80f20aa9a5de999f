"""Files on web servers, which are only read: whole, going on where a broken transfer stopped, or in ranges."""

from __future__ import annotations

import base64
import http.client
import logging
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import httpx

from svd.core.addresses import public_address
from svd.core.errors import UserError
from svd.core.retries import Transient, retrying
from svd.storage import redirects
from svd.storage.backend import Entry, Kind

_PATIENCE = 60
_PASSING = (408, 425, 429)
_BLOCK = 1 << 20
logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every full address, with its signature


class Web:
    """The backend for http(s) addresses; see svd.storage.backend.Backend. It refuses to write and to list."""

    kind: Kind = "web"

    def list(self, location: str) -> Iterator[Entry]:
        """Raise UserError: web servers have no folders."""
        raise UserError(f"{location}: a web server can't be listed; give the addresses of the files, or a list of them")

    def size(self, location: str) -> int:
        """Return the size in bytes."""
        return _open_ranges(location)[1]

    def version(self, location: str) -> str:
        """Return the ETag, or else the time of the last change; empty when the server tells neither."""
        return _open_ranges(location)[2]

    def stored_sha256(self, location: str) -> str | None:
        """Return None: web servers don't tell it."""
        return None

    def read(self, location: str, start: int, length: int | None) -> tuple[bytes, str | None]:
        """Read a range."""
        read, size = self.ranges(location)
        available = max(0, size - start)
        wanted = available if length is None else min(length, available)
        return read(start, wanted) if wanted else b"", None

    def ranges(self, location: str) -> tuple[Callable[[int, int], bytes], int]:
        """Return a reader over one kept connection.

        Raises UserError for refusals, for a server that ignores ranges or does not tell the size, and from the reader
        when the file became another one.
        """
        return _open_ranges(location)[:2]

    def fetch(self, location: str, path: Path, most: float, seconds: float) -> bool:
        """Write the whole to `path`; raises UserError after `most` bytes or `seconds`."""
        download_address(location, path, most, seconds)
        return True

    def put(self, path: Path, location: str) -> None:
        """Raise UserError."""
        _refuse_writing(location)

    def write(self, location: str, data: bytes) -> None:
        """Raise UserError."""
        _refuse_writing(location)

    def replace(self, location: str, data: bytes, expected: str | None) -> str:
        """Raise UserError."""
        _refuse_writing(location)

    def copy_within(self, source: str, target: str) -> None:
        """Raise UserError."""
        _refuse_writing(target)

    def remove(self, location: str) -> None:
        """Raise UserError."""
        _refuse_writing(location)

    def share(self, location: str, seconds: int, content_type: str) -> str:
        """Return the address itself."""
        self.size(location)
        return location


def _refuse_writing(location: str) -> NoReturn:
    raise UserError(f"{location}: a web address is only read; give a path or s3://bucket/key to write to")


def download_address(address: str, path: Path, most: float = math.inf, seconds: float = math.inf) -> None:
    """Write what `address` serves to `path`.

    A transfer that breaks is continued when the server supports ranges and still has the same version, else it starts
    again. most, seconds: bytes and time after which it is given up, for servers that never end. Raises
    FileNotFoundError (404, 410), UserError (denied, other refusals, too much) and svd.core.retries.Unreachable.
    """
    path.unlink(missing_ok=True)
    validator: list[str] = []
    limits = most, time.monotonic() + seconds
    retrying(lambda: _continue(address, path, validator, limits), public_address(address))


def _continue(address: str, path: Path, validator: list[str], limits: tuple[float, float]) -> None:
    """One try; `validator` remembers the version (ETag or date) that the bytes in `path` belong to."""
    have = path.stat().st_size if path.exists() and validator else 0
    request = _request(address)
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", validator[0])
    try:
        with redirects.opener().open(request, timeout=_PATIENCE) as response:
            _receive(response, path, have, validator, limits)
    except urllib.error.HTTPError as error:
        raise _refusal(error.code, error.reason, address) from None
    except http.client.InvalidURL:  # its text is the whole address
        raise UserError(f"{public_address(address)}: no valid address; are there spaces in it?") from None
    except (http.client.HTTPException, OSError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise Transient(str(reason) or type(error).__name__) from error


def _request(address: str) -> urllib.request.Request:
    """A request for `address`, whose user and password, which urllib takes for a part of the host, become a header.

    The header isn't sent on to where the server redirects to.
    """
    parts = urllib.parse.urlsplit(address)
    login, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers={"User-Agent": "svd-platform"})
    if at:
        encoded = base64.b64encode(urllib.parse.unquote_to_bytes(login)).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return request


def _receive(
    response: http.client.HTTPResponse, path: Path, have: int, validator: list[str], limits: tuple[float, float]
) -> None:
    """Append to `path`, or start it again when the server sends the whole; raises Transient for a short body."""
    resumed = response.status == http.client.PARTIAL_CONTENT
    strong = response.headers.get("ETag", "")
    validator[:] = [v for v in (strong if not strong.startswith("W/") else "", response.headers["Last-Modified"]) if v]
    length = response.headers.get("Content-Length")
    start = have if resumed else 0
    with path.open("ab" if resumed else "wb") as stream:
        _copy(response, stream, limits)
        arrived = stream.tell() - start
    if length is not None and arrived != int(length):
        raise Transient(f"{arrived} of {length} bytes arrived")


def _copy(response: http.client.HTTPResponse, stream: BinaryIO, limits: tuple[float, float]) -> None:
    """Copy until the server ends; raises UserError once it has sent too much or for too long."""
    (most, end), shown = limits, public_address(response.url)
    while block := response.read1(_BLOCK):
        stream.write(block)
        if stream.tell() > most:
            raise UserError(f"{shown}: more than {most / 1e6:,.0f} MB; the transfer was given up")
        if time.monotonic() > end:
            raise UserError(f"{shown}: does not come to an end; the transfer was given up")


def _refusal(code: int, reason: str, address: str) -> Exception:
    address = public_address(address)
    if code >= 500 or code in _PASSING:
        return Transient(f"the server answers {code} {reason}")
    if code in (404, 410):
        return FileNotFoundError(f"{address}: no such file ({code})")
    return UserError(f"{address}: the server answers {code} {reason}; check the address and your access")


def _open_ranges(address: str) -> tuple[Callable[[int, int], bytes], int, str]:
    """A reader of (start, length) of the file at `address`, its size in bytes, and its version (ETag or date)."""
    shown = public_address(address)
    client = redirects.client(address, _PATIENCE)
    _, headers = retrying(lambda: _get_range(client, address, 0, 1), shown)
    total = headers.get("Content-Range", "").rpartition("/")[2]
    if not total.isdigit():
        raise UserError(f"{shown}: the server does not tell the size of the file; download it first")
    strong = headers.get("ETag", "")
    validator = strong if strong and not strong.startswith("W/") else headers.get("Last-Modified", "")

    def read(start: int, length: int) -> bytes:
        return retrying(lambda: _get_range(client, address, start, length, validator), shown)[0]

    return read, int(total), validator


def _get_range(
    client: httpx.Client, address: str, start: int, length: int, validator: str = ""
) -> tuple[bytes, httpx.Headers]:
    """One try; nothing but the range is read when the server sends the whole file instead."""
    headers = {"Range": f"bytes={start}-{start + length - 1}"} | ({"If-Range": validator} if validator else {})
    try:
        with client.stream("GET", address, headers=headers) as response:
            if response.status_code == httpx.codes.OK:
                change = "the file became another one while it was read" if validator else "the server ignores ranges"
                raise UserError(f"{public_address(address)}: {change}; download it first")
            if response.status_code != httpx.codes.PARTIAL_CONTENT:
                raise _refusal(response.status_code, response.reason_phrase, address)
            data = b"".join(response.iter_raw())
    except httpx.InvalidURL as error:
        raise UserError(f"{public_address(address)}: {error}") from None
    except httpx.HTTPError as error:
        raise Transient(str(error) or type(error).__name__) from error
    if len(data) != length:
        raise Transient(f"{len(data)} of {length} bytes arrived")
    return data, response.headers
