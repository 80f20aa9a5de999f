"""A page answers to this machine's names and addresses alone: a site that points its own name here gets nothing."""

from __future__ import annotations

import socket

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from svd.core.hosts import refuse_foreign_hosts


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    refuse_foreign_hosts(app, ["vote.example.org"])

    @app.get("/")
    def page() -> str:
        return "secret"

    return TestClient(app)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8124", "localhost:8124", "[::1]:8124", "192.168.1.7", "Vote.example.org", socket.gethostname()]
)
def test_own_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"Host": host}).json() == "secret"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8124"])
def test_foreign_names_are_refused(client: TestClient, host: str) -> None:
    answer = client.get("/", headers={"Host": host})
    assert answer.status_code == 421 and "secret" not in answer.text
