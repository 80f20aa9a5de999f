"""The journal: nothing is lost, nothing is delivered twice, whatever fails in between."""

import contextlib
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.tracking.journal import Courier, Journal


class FlakyServer:
    """Refuses the calls whose number is in `down`; remembers what it accepted."""

    def __init__(self, down: set[int]) -> None:
        self.down = down
        self.calls = 0
        self.accepted: list[int] = []

    def __call__(self, entry: dict, files: Path) -> None:
        self.calls += 1
        if self.calls in self.down:
            raise ConnectionError("refused")
        self.accepted.append(entry["n"])


@settings(deadline=None, max_examples=30)
@given(st.sets(st.integers(1, 12)), st.integers(1, 12))
def test_every_entry_arrives_once_and_in_order(tmp_path_factory, down: set[int], count: int) -> None:
    journal = Journal(tmp_path_factory.mktemp("journal"))
    for n in range(count):
        journal.append({"op": "x", "n": n})
    server = FlakyServer(down)
    while journal.pending():
        with contextlib.suppress(ConnectionError):
            journal.deliver(server)
    assert server.accepted == list(range(count))


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"op": "x", "n": 0})
    with journal.path.open("ab") as stream:
        stream.write(b'{"op": "x", "n"')
    reopened = Journal(tmp_path)
    reopened.append({"op": "x", "n": 1})
    assert [entry["n"] for entry in reopened.entries("x")] == [0, 1]
    assert all(json.loads(line) for line in reopened.path.read_text().splitlines())


def test_a_server_that_comes_back_gets_what_waited(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    server = FlakyServer(down={1, 2, 3})
    courier = Courier(journal, server, "server", first_wait=0.01, longest=0.02)
    for n in range(5):
        journal.append({"op": "x", "n": n})
    assert courier.close(patience=5)
    assert server.accepted == [0, 1, 2, 3, 4]


def test_a_server_that_stays_away_leaves_the_journal_on_disk(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    courier = Courier(journal, FlakyServer(down=set(range(1000))), "server", first_wait=0.01)
    journal.append({"op": "x", "n": 0})
    assert not courier.close(patience=0.05)
    assert Journal(tmp_path).pending()


def test_the_offset_survives_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"op": "x", "n": 0})
    journal.append({"op": "x", "n": 1})
    with pytest.raises(ConnectionError):
        journal.deliver(FlakyServer(down={2}))
    server = FlakyServer(down=set())
    Journal(tmp_path).deliver(server)
    assert server.accepted == [1]


class SlowServer:
    """Takes a while for each entry."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.accepted: list[str] = []

    def __call__(self, entry: dict, files: Path) -> None:
        time.sleep(self.seconds)
        self.accepted.append(entry["op"])


def test_a_model_is_waited_for_while_it_is_sent_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.tracking.journal.REQUEST_SECONDS", 0.05)
    for operation, done in (("model", True), ("metrics", False)):
        journal = Journal(tmp_path / operation)
        journal.append({"op": operation})
        server = SlowServer(1)
        courier = Courier(journal, server, "server", first_wait=0.01)
        time.sleep(0.2)
        assert courier.close(patience=0.1) is done
        assert server.accepted == [operation] * done


def test_a_model_waits_longer_for_a_server_that_is_away(tmp_path: Path) -> None:
    for operation, done in (("model", True), ("metrics", False)):
        journal = Journal(tmp_path / operation)
        journal.append({"op": operation, "n": 0})
        server = FlakyServer(down=set(range(1, 20)))
        courier = Courier(journal, server, "server", first_wait=0.05, longest=0.05)
        assert courier.close(patience=0.1, upload_patience=30) is done


def test_which_kinds_of_entries_wait(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert not journal.waiting("model")
    journal.append({"op": "model", "n": 0})
    journal.append({"op": "metrics", "n": 1})
    assert journal.waiting("model")
    with pytest.raises(ConnectionError):
        journal.deliver(FlakyServer(down={2}))
    assert not journal.waiting("model") and journal.waiting("metrics")
