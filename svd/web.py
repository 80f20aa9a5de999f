"""Files from http(s) addresses: tried again after failures, going on where a broken transfer stopped."""

from __future__ import annotations

import http.client
import math
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from svd.retries import Transient, retrying
from svd.stage import UserError

_PATIENCE = 60
_PASSING = (408, 425, 429)
_BLOCK = 1 << 20


def download_address(address: str, path: Path, most: float = math.inf, seconds: float = math.inf) -> None:
    """Write what `address` serves to `path`.

    A transfer that breaks is continued when the server supports ranges and still has the same version, else it starts
    again. most, seconds: bytes and time after which it is given up, for servers that never end. Raises
    FileNotFoundError (404, 410), UserError (denied, other refusals, too much) and svd.retries.Unreachable.
    """
    path.unlink(missing_ok=True)
    validator: list[str] = []
    limits = most, time.monotonic() + seconds
    retrying(lambda: _continue(address, path, validator, limits), address)


def _continue(address: str, path: Path, validator: list[str], limits: tuple[float, float]) -> None:
    """One try; `validator` remembers the version (ETag or date) that the bytes in `path` belong to."""
    have = path.stat().st_size if path.exists() and validator else 0
    request = urllib.request.Request(address, headers={"User-Agent": "svd-platform"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", validator[0])
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as response:
            _receive(response, path, have, validator, limits)
    except urllib.error.HTTPError as error:
        raise _refusal(error, address) from None
    except (http.client.HTTPException, OSError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise Transient(str(reason) or type(error).__name__) from error


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
    most, end = limits
    while block := response.read1(_BLOCK):
        stream.write(block)
        if stream.tell() > most:
            raise UserError(f"{response.url}: more than {most / 1e6:,.0f} MB; the transfer was given up")
        if time.monotonic() > end:
            raise UserError(f"{response.url}: does not come to an end; the transfer was given up")


def _refusal(error: urllib.error.HTTPError, address: str) -> Exception:
    if error.code >= 500 or error.code in _PASSING:
        return Transient(f"the server answers {error.code} {error.reason}")
    if error.code in (404, 410):
        return FileNotFoundError(f"{address}: no such file ({error.code})")
    return UserError(f"{address}: the server answers {error.code} {error.reason}; check the address and your access")
