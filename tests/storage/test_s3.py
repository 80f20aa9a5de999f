"""svd/storage/s3.py against a real S3 server (SeaweedFS): parts, damage on the way, mistakes, outages and restarts."""

from __future__ import annotations

import io
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_fixtures import make_file
from servers import S3Server, free_ports

from svd import storage
from svd.core import retries
from svd.core.errors import UserError
from svd.core.retries import Unreachable
from svd.storage import s3

MB = 1 << 20


def uploads_in_progress(bucket: str) -> list[str]:
    answer = s3.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    return [item["Key"] for item in answer.get("Uploads", [])]


def test_listing_goes_on_after_a_page(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PAGE", 3)
    names = sorted(f"{i % 3}/{i:02}" for i in range(10))
    for name in names:
        storage.write_bytes(f"{bucket}/many/{name}", name.encode())
    assert [e.relative for e in storage.list_files(f"{bucket}/many")] == names


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
