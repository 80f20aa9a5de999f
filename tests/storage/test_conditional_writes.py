"""Conditional writes: of many writers that expect the same version exactly one wins, here and on a real S3 server."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from svd import storage
from svd.core.errors import UserError
from svd.storage import s3

WRITERS = 8


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("bucket"))


def race(pool: ThreadPoolExecutor, location: str, expected: str | None, mark: str) -> list[tuple[bytes, str]]:
    """Let all writers replace at once; what the winners wrote, and the versions that they were told."""
    barrier = threading.Barrier(WRITERS)

    def write(number: int) -> tuple[bytes, str] | None:
        data = f"{mark} by {number}".encode()
        barrier.wait()
        try:
            return data, storage.replace(location, data, expected)
        except storage.Conflict:
            return None

    return [result for result in pool.map(write, range(WRITERS)) if result]


def is_stored(location: str) -> tuple[bytes, str]:
    return storage.read_bytes(location), storage.version(location)


def test_one_of_many_writers_wins(root: str) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        for number in range(2):
            location, version = f"{root}/key-{number}", None
            for again in range(3):
                won = race(pool, location, version, f"round {again}")
                assert won == [is_stored(location)]
                version = won[0][1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_one_of_many_writers_wins_in_every_of_200_rounds(bucket: str) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        for number in range(100):
            location = f"{bucket}/key-{number}"
            created = race(pool, location, None, "created")
            assert created == [is_stored(location)]
            assert race(pool, location, created[0][1], "replaced") == [is_stored(location)]


def test_a_counter_loses_no_step(root: str) -> None:
    storage.replace(f"{root}/counter", b"0 nobody", None)

    def count(name: str) -> None:
        steps = 0
        while steps < 5:
            version = storage.version(f"{root}/counter")
            value = int(storage.read_bytes(f"{root}/counter").split()[0])
            with contextlib.suppress(storage.Conflict):
                storage.replace(f"{root}/counter", f"{value + 1} {name}".encode(), version)
                steps += 1

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(count, "abc"))
    assert storage.read_bytes(f"{root}/counter").split()[0] == b"15"


def test_what_is_missing_or_older_is_no_match(root: str) -> None:
    with pytest.raises(storage.Conflict):
        storage.replace(f"{root}/missing", b"1", '"0123"')
    first = storage.replace(f"{root}/key", b"1", None)
    second = storage.replace(f"{root}/key", b"2", first)
    with pytest.raises(storage.Conflict):
        storage.replace(f"{root}/key", b"3", first)
    assert storage.version(f"{root}/key") == second


def test_a_lost_answer_is_no_conflict(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = s3.client().put_object, []

    def answer_lost(**arguments: object) -> object:
        calls.append(real(**arguments))
        if len(calls) == 1:
            raise s3.ConnectionError(error="reset by peer")
        return calls[-1]

    monkeypatch.setattr(s3.client(), "put_object", answer_lost)
    version = storage.replace(f"{bucket}/key", b"1", None)
    assert version == storage.version(f"{bucket}/key") and storage.read_bytes(f"{bucket}/key") == b"1"


def test_a_web_address_is_refused() -> None:
    with pytest.raises(UserError, match="only read"):
        storage.replace("https://127.0.0.1/key", b"1", None)
