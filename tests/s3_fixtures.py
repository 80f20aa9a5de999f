"""Fixtures of a real S3 server: one for the whole session, and a fresh bucket and its environment for each test.

The library is imported where it is used: every test's process reads this file.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from servers import S3Server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS on free ports, started when the first test asks for it."""
    from servers import S3Server

    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`s3://<a new bucket>`; the environment points to the server.

    It is deleted after the test: SeaweedFS gives each bucket volumes of its own, as many as there are GiB of free disk.
    """
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid.uuid4().hex[:8]}"
    s3_server.make_bucket(name)
    yield f"s3://{name}"
    s3_server.delete_bucket(name)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the smallest size that S3 allows."""
    from svd.storage import s3

    monkeypatch.setattr(s3, "PART", 5 << 20)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    from svd.core import retries

    monkeypatch.setattr(retries, "ATTEMPTS", 3)
    monkeypatch.setattr(retries, "LONGEST_WAIT", 0.1)


def make_file(path: Path, size: int, seed: int = 0) -> Path:
    path.write_bytes((seed.to_bytes(8, "little") + os.urandom(4096) * (size // 4096 + 1))[:size])
    return path


def put_raw(location: str, data: bytes, digest: str | None) -> None:
    """Store an object as someone else would, with any metadata."""
    from svd import storage
    from svd.storage import s3

    bucket, key = storage.split_uri(location)
    marks = {"Metadata": {"sha256": digest}} if digest else {}
    s3.client().put_object(Bucket=bucket, Key=key, Body=data, **marks)
