"""svd/storage: one interface to local files, a real S3 server (SeaweedFS) and a local http server."""

from __future__ import annotations

import http.server
import os
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_fixtures import make_file, put_raw

from svd import storage
from svd.core import retries
from svd.core.errors import UserError
from svd.core.retries import Unreachable
from svd.storage import s3


@pytest.mark.parametrize("remote", [False, True], ids=["local", "s3"])
def test_every_operation_means_the_same_here_and_there(bucket: str, tmp_path: Path, remote: bool) -> None:
    root = f"{bucket}/folder" if remote else str(tmp_path / "folder")
    storage.write_bytes(f"{root}/a/b.txt", b"0123456789")
    storage.upload(make_file(tmp_path / "file", 1000), f"{root}/a.txt")
    storage.copy(f"{root}/a/b.txt", f"{root}/copies/c.txt")
    entries = list(storage.list_files(root))
    assert [(e.relative, e.size) for e in entries] == [("a.txt", 1000), ("a/b.txt", 10), ("copies/c.txt", 10)]
    assert [e.relative for e in storage.list_files(f"{root}/a")] == ["b.txt"]
    assert storage.read_range(f"{root}/a/b.txt", 2, 3) == b"234"
    assert storage.read_range(f"{root}/a/b.txt", 8, 100) == b"89"
    assert storage.read_range(f"{root}/a/b.txt", 20, 5) == b"" == storage.read_range(f"{root}/a/b.txt", 2, 0)
    assert storage.read_bytes(f"{root}/copies/c.txt") == b"0123456789"
    assert storage.size(f"{root}/a.txt") == 1000
    assert storage.exists(f"{root}/a.txt") and not storage.exists(f"{root}/a") and not storage.exists(f"{root}/x")
    storage.delete(f"{root}/a.txt")
    storage.delete(f"{root}/a.txt")
    assert not storage.exists(f"{root}/a.txt")
    with pytest.raises(FileNotFoundError):
        storage.size(f"{root}/a.txt")
    assert list(storage.list_files(f"{root}/nothing")) == []


def test_an_empty_object(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    storage.upload(tmp_path / "empty", f"{bucket}/empty")
    assert storage.download(f"{bucket}/empty", tmp_path / "back").read_bytes() == b""
    assert storage.read_bytes(f"{bucket}/empty") == b""


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 200_000)), max_size=8))
def test_a_remote_stream_reads_like_a_local_one(bucket: str, tmp_path: Path, moves: list[tuple[int, int]]) -> None:
    path = tmp_path / "data"
    if not path.exists():
        storage.upload(make_file(path, 250_000), f"{bucket}/data")
    with storage.open_read(f"{bucket}/data") as remote, path.open("rb") as local:
        for position, length in moves:
            assert remote.seek(position) == local.seek(position)
            assert remote.read(length) == local.read(length)
        assert remote.seek(-10, 2) == local.seek(-10, 2)
        assert remote.read() == local.read()


def test_a_disk_that_fails_once_while_it_is_flushed_fails_the_download(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{bucket}/data", b"0123456789")
    real, calls = os.fsync, []

    def fail_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:  # the system reports a lost write once
            raise OSError("input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(OSError, match="input/output error"):
        storage.download(f"{bucket}/data", tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_tampered_and_truncated_objects_are_not_accepted(bucket: str, tmp_path: Path) -> None:
    path = make_file(tmp_path / "file", 5000)
    digest = storage.sha256(path)
    for name, data in (("tampered", b"x" + path.read_bytes()[1:]), ("truncated", path.read_bytes()[:4000])):
        put_raw(f"{bucket}/{name}", data, digest)
        with pytest.raises(storage.Truncated, match="SHA-256 differs"):
            storage.download(f"{bucket}/{name}", tmp_path / "back")
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
    put_raw(f"{bucket}/foreign", b"without checksum", None)
    assert storage.download(f"{bucket}/foreign", tmp_path / "foreign").read_bytes() == b"without checksum"


def test_an_object_that_is_replaced_while_it_is_read(bucket: str, tmp_path: Path, small_parts: None) -> None:
    first, second = make_file(tmp_path / "1", 300_000, 1), make_file(tmp_path / "2", 300_000, 2)
    storage.upload(first, f"{bucket}/data")
    with storage.RangedReader(f"{bucket}/data") as stream:
        assert stream.read(10) == first.read_bytes()[:10]
        storage.upload(second, f"{bucket}/data")
        with pytest.raises(UserError, match="was replaced while it was read"):
            stream.read(10)


def test_a_link_opens_without_credentials(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>one</p>")
    storage.upload(tmp_path / "page.html", f"{bucket}/a b/page.html")
    for location in (f"{bucket}/a b/page.html", str(tmp_path / "page.html")):
        with urllib.request.urlopen(storage.link(location)) as answer:
            assert answer.read() == b"<p>one</p>"
            assert answer.headers["Content-Type"] == "text/html"
    for location in (f"{bucket}/missing.html", str(tmp_path / "missing.html")):
        with pytest.raises(FileNotFoundError, match=location):
            storage.link(location)


class Unreliable(http.server.BaseHTTPRequestHandler):
    """Serves `body`, but breaks off after `cut` bytes as often as `failures` says."""

    body = bytes(range(256)) * 400
    failures = 0
    ranges = True
    status = 200
    requests: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if self.status != 200:
            self.send_error(self.status)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.send_header("ETag", '"1"')
        self.end_headers()
        data = self.body[start:]
        if self.failures:
            type(self).failures -= 1
            data = data[:20_000]
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        return


@pytest.fixture
def site() -> Iterator[str]:
    Unreliable.failures, Unreliable.ranges, Unreliable.status, Unreliable.requests = 0, True, 200, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unreliable)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/video.mp4"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_http_download_goes_on(
    site: str, tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "LONGEST_WAIT", 0.1)
    Unreliable.failures, Unreliable.ranges = 2, ranges
    assert storage.download(site, tmp_path / "video.mp4").read_bytes() == Unreliable.body
    assert Unreliable.requests == [None, "bytes=20000-", "bytes=40000-" if ranges else "bytes=20000-"]


@pytest.mark.parametrize(
    ("status", "kind", "tries"), [(404, FileNotFoundError, 1), (403, UserError, 1), (503, Unreachable, 3)]
)
def test_http_refusals(
    site: str, tmp_path: Path, status: int, kind: type[Exception], tries: int, impatient: None
) -> None:
    Unreliable.status = status
    with pytest.raises(kind, match=str(status)):
        storage.download(site, tmp_path / "video.mp4")
    assert len(Unreliable.requests) == tries
    assert list(tmp_path.iterdir()) == []


def test_local_writes_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder" / "file"
    storage.write_bytes(f"file://{target}", b"old")

    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space left"):
        storage.write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in target.parent.iterdir()] == ["file"]


def test_small_objects_are_read_in_one_version_and_checked(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    location = f"{bucket}/manifest"
    storage.write_bytes(location, b"x" * 100)
    real, asked = s3.head, []

    def replaced_meanwhile(address: s3.Address) -> dict[str, object]:
        about = real(address)
        asked.append(address)
        if len(asked) == 1:
            storage.write_bytes(location, b"y" * 150)
        return about

    monkeypatch.setattr(s3, "head", replaced_meanwhile)
    assert storage.read_bytes(location) == b"y" * 150
    assert len(asked) == 2
    put_raw(location, b"damaged", "0" * 64)
    with pytest.raises(storage.Truncated, match="SHA-256 differs"):
        storage.read_bytes(location)
