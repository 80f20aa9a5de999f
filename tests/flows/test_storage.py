"""svd/storage.py against a real S3 server (SeaweedFS), with failures and restarts, and against a local http server."""

from __future__ import annotations

import http.server
import io
import os
import threading
import time
import tracemalloc
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import S3Server, free_ports

from svd import retries, s3, storage
from svd.retries import Unreachable
from svd.stage import UserError

MB = 1 << 20


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the smallest size that S3 allows."""
    monkeypatch.setattr(s3, "PART", 5 * MB)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", 3)
    monkeypatch.setattr(retries, "LONGEST_WAIT", 0.1)


def make_file(path: Path, size: int, seed: int = 0) -> Path:
    path.write_bytes((seed.to_bytes(8, "little") + os.urandom(4096) * (size // 4096 + 1))[:size])
    return path


def uploads_in_progress(bucket: str) -> list[str]:
    answer = s3.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    return [item["Key"] for item in answer.get("Uploads", [])]


def put_raw(location: str, data: bytes, digest: str | None) -> None:
    """Store an object as someone else would, with any metadata."""
    bucket, key = storage.split_uri(location)
    marks = {"Metadata": {"sha256": digest}} if digest else {}
    s3.client().put_object(Bucket=bucket, Key=key, Body=data, **marks)


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


def test_listing_goes_on_after_a_page(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PAGE", 3)
    names = sorted(f"{i % 3}/{i:02}" for i in range(10))
    for name in names:
        storage.write_bytes(f"{bucket}/many/{name}", name.encode())
    assert [e.relative for e in storage.list_files(f"{bucket}/many")] == names


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


def test_a_large_file_goes_in_parts_and_comes_back(bucket: str, tmp_path: Path, small_parts: None) -> None:
    path = make_file(tmp_path / "large", 17 * MB + 5)
    storage.upload(path, f"{bucket}/large")
    about = s3.head(s3.Address(*storage.split_uri(f"{bucket}/large")))
    assert about["ETag"].endswith('-4"') and about["Metadata"]["sha256"] == storage.sha256(path)
    storage.copy(f"{bucket}/large", f"{bucket}/copy")
    assert storage.sha256(storage.download(f"{bucket}/copy", tmp_path / "back")) == storage.sha256(path)
    assert s3.head(s3.Address(*storage.split_uri(f"{bucket}/copy")))["Metadata"] == about["Metadata"]
    assert uploads_in_progress(bucket) == []


def test_an_upload_that_fails_leaves_nothing(
    bucket: str, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_file(tmp_path / "large", 12 * MB)
    storage.write_bytes(f"{bucket}/large", b"old")
    real, calls = os.pread, []

    def fail_in_second_part(descriptor: int, length: int, offset: int) -> bytes:
        calls.append(offset)
        if offset:
            raise OSError("the disk is broken")
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", fail_in_second_part)
    with pytest.raises(OSError, match="the disk is broken"):
        storage.upload(path, f"{bucket}/large")
    assert len(calls) >= 2
    assert uploads_in_progress(bucket) == []
    assert storage.read_bytes(f"{bucket}/large") == b"old"


def test_a_file_that_changes_during_the_upload_is_refused(
    bucket: str, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_file(tmp_path / "large", 6 * MB)
    real = s3._complete

    def change_then_complete(*arguments: object) -> None:
        with path.open("ab") as stream:
            stream.write(b"more")
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(s3, "_complete", change_then_complete)
    with pytest.raises(UserError, match="was changed while it was sent"):
        storage.upload(path, f"{bucket}/large")
    assert not storage.exists(f"{bucket}/large")


def test_an_answer_that_was_lost_after_completion_is_no_failure(
    bucket: str, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_file(tmp_path / "large", 6 * MB)
    client = s3.client()
    real, calls = client.complete_multipart_upload, []

    def complete_and_lose_the_answer(**arguments: object) -> object:
        calls.append(arguments)
        answer = real(**arguments)
        if len(calls) == 1:
            raise s3.ConnectionError(error="connection reset")
        return answer

    monkeypatch.setattr(client, "complete_multipart_upload", complete_and_lose_the_answer)
    storage.upload(path, f"{bucket}/large")
    assert len(calls) == 2
    assert storage.sha256(storage.download(f"{bucket}/large", tmp_path / "back")) == storage.sha256(path)


@pytest.mark.parametrize(("operation", "size"), [("PutObject", 1000), ("UploadPart", 12 * MB)])
def test_what_is_damaged_on_its_way_up_is_sent_again(
    bucket: str, tmp_path: Path, small_parts: None, operation: str, size: int
) -> None:
    path = make_file(tmp_path / "file", size)
    events, damaged = s3.client().meta.events, []

    def damage_once(request: Any, **_: object) -> None:
        if not damaged:
            damaged.append(request.url)
            request.body = io.BytesIO(request.body.read()[:-1] + b"?")

    events.register(f"before-send.s3.{operation}", damage_once)
    try:
        storage.upload(path, f"{bucket}/file")
    finally:
        events.unregister(f"before-send.s3.{operation}", damage_once)
    assert len(damaged) == 1
    assert storage.download(f"{bucket}/file", tmp_path / "back").read_bytes() == path.read_bytes()


def test_a_part_that_arrives_short_is_fetched_again(
    bucket: str, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_file(tmp_path / "large", 12 * MB)
    storage.upload(path, f"{bucket}/large")
    real, calls = s3.client().get_object, []

    def short_at_first(**arguments: object) -> dict[str, Any]:
        answer: dict[str, Any] = real(**arguments)
        calls.append(arguments["Range"])
        if len(calls) == 1:
            answer["Body"] = io.BytesIO(answer["Body"].read()[:-1])
        return answer

    monkeypatch.setattr(s3.client(), "get_object", short_at_first)
    assert storage.download(f"{bucket}/large", tmp_path / "back").read_bytes() == path.read_bytes()
    assert len(calls) == 4 and len(set(calls)) == 3


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


def test_a_download_needs_less_memory_than_its_parts(
    bucket: str, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "THREADS", 2)
    storage.upload(make_file(tmp_path / "large", 24 * MB), f"{bucket}/large")
    tracemalloc.start()
    try:
        storage.download(f"{bucket}/large", tmp_path / "back")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * MB, f"{peak / MB:.1f} MB for two parts of 5 MB"


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


def test_mistakes_are_one_line(
    bucket: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    def fails(match: str, kind: type[Exception] = UserError) -> None:
        path = make_file(tmp_path / "file", 10)
        for action in (
            lambda: storage.upload(path, f"{bucket}/x"),
            lambda: storage.write_bytes(f"{bucket}/x", b""),
            lambda: storage.delete(f"{bucket}/x"),
        ):
            with pytest.raises(kind, match=match) as caught:
                action()
            assert "\n" not in str(caught.value)

    storage.write_bytes(f"{bucket}/there", b"1")
    for name, value in s3_server.environment(reader=True).items():
        monkeypatch.setenv(name, value)
    assert storage.read_bytes(f"{bucket}/there") == b"1"
    fails("access denied.*AccessDenied")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    fails("access denied.*SignatureDoesNotMatch")
    with pytest.raises(UserError, match="access denied"):
        storage.exists(f"{bucket}/there")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    fails("Could not connect", Unreachable)


def test_missing_buckets_objects_and_credentials(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    with pytest.raises(FileNotFoundError, match=f"{bucket}/missing: no such object"):
        storage.download(f"{bucket}/missing", tmp_path / "x")
    for action in (storage.size, storage.exists, storage.read_bytes, lambda uri: list(storage.list_files(uri))):
        with pytest.raises(UserError, match="no such bucket"):
            action("s3://no-such-bucket/key")
    with pytest.raises(UserError, match="no such bucket"):
        storage.write_bytes("s3://no-such-bucket/key", b"1")
    with pytest.raises(UserError, match="expected s3://bucket/key"):
        storage.size("s3:///key")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match="no S3 credentials; set AWS_ACCESS_KEY_ID"):
        storage.size(f"{bucket}/key")


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


@pytest.fixture
def own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server of the test's own, which it may kill."""
    server = S3Server(tmp_path / "server")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    server.start()
    server.make_bucket("work")
    yield server
    server.stop()


def test_the_server_is_killed_and_restarted_during_transfers(
    own_server: S3Server, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "LONGEST_WAIT", 4.0)
    path = make_file(tmp_path / "large", 60 * MB)
    calls: list[float] = []
    outage = threading.Event()

    def restart_after_three(real: object) -> object:
        def action(**arguments: object) -> object:
            calls.append(time.monotonic())
            if len(calls) == 3:
                outage.set()
            return real(**arguments)  # type: ignore[operator]

        return action

    def restart() -> None:
        outage.wait(60)
        own_server.kill()
        time.sleep(1)
        own_server.start()

    for method, transfer in (
        ("upload_part", lambda: storage.upload(path, "s3://work/large")),
        ("get_object", lambda: storage.download("s3://work/large", tmp_path / "back")),
    ):
        calls.clear()
        outage.clear()
        monkeypatch.setattr(s3.client(), method, restart_after_three(getattr(s3.client(), method)))
        killer = threading.Thread(target=restart)
        killer.start()
        transfer()
        killer.join()
        assert len(calls) > 12, "no part was tried again"
    assert storage.sha256(tmp_path / "back") == storage.sha256(path)
    assert uploads_in_progress("s3://work") == []


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
