"""Fixtures of a real S3 server: one for the whole session, and a fresh bucket and its environment for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
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
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://<a new bucket>`; the environment points to the server."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid.uuid4().hex[:8]}"
    s3_server.make_bucket(name)
    return f"s3://{name}"
