"""Redirects of web servers: followed, but not from the outside to an address inside this network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from web_server import serving

from svd import storage
from svd.core.errors import UserError
from svd.storage import redirects


@pytest.fixture
def target(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "clip.mp4").write_bytes(b"inside")
    with serving(tmp_path) as (address, _):
        yield f"{address}/clip.mp4"


@pytest.fixture
def outside(target: str) -> Iterator[str]:
    """The address of a server that redirects to `target`; by the name localhost, which the tests take for public."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_address[1]}/clip.mp4"
    server.shutdown()
    server.server_close()


def fetch(address: str, tmp_path: Path) -> bytes:
    storage.download(address, tmp_path / "got", 1000, 10)
    return (tmp_path / "got").read_bytes()


def read_range(address: str, tmp_path: Path) -> bytes:
    with storage.open_read(address, 1024) as stream:
        return bytes(stream.read(6))


@pytest.mark.parametrize("get", [fetch, read_range])
def test_a_public_server_cannot_lead_inside(
    get: Callable[[str, Path], bytes], outside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get(outside, tmp_path) == b"inside", "from one private address to another"
    monkeypatch.setattr(redirects, "is_private", lambda host: host != "localhost")
    with pytest.raises(UserError, match=r"leads to '127\.0\.0\.1', an address inside.*SVD_PRIVATE_REDIRECTS=1"):
        get(outside, tmp_path)
    monkeypatch.setenv("SVD_PRIVATE_REDIRECTS", "1")
    assert get(outside, tmp_path) == b"inside"


@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.0.1", "::1", "localhost"])
def test_what_is_private(host: str) -> None:
    assert redirects.is_private(host)


def test_what_is_public() -> None:
    assert not redirects.is_private("8.8.8.8") and not redirects.is_private("no-such-name.invalid")
