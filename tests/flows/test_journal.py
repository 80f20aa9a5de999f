"""The journal: nothing is lost, nothing is delivered twice, whatever fails in between."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.tracking.journal import Courier, Journal
from flows.tracking.runs import RunInfo, send_pending, tracked_run

NOTHING: dict[str, dict[str, str]] = {"tags": {}, "params": {}}


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


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """MLflow's address is one that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


def test_a_server_that_hangs_costs_a_run_one_request_not_one_per_entry(
    hanging: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.tracking.journal.REQUEST_SECONDS", 3)
    start = time.monotonic()
    with tracked_run(RunInfo("stage-1", "stage"), patience=2) as tracker:
        for number in range(20):
            tracker.log_text("x" * 1000, f"file-{number}.txt")
    assert time.monotonic() - start < 6
    (journal,) = (tmp_path / "work/tracking").glob("*/journal.jsonl")
    assert journal.read_text().count('"op": "file"') == 20


def test_many_journals_wait_together_for_a_server_that_hangs(
    hanging: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.tracking.journal.REQUEST_SECONDS", 1)
    monkeypatch.setattr("flows.tracking.runs.SEND_SECONDS", 2)
    for number in range(12):
        Journal(tmp_path / "work/tracking" / str(number)).append(
            {"op": "start", "key": str(number), "name": "x", "parent": None, "time": 0, "pid": -1} | NOTHING
        )
    start = time.monotonic()
    assert send_pending() == (0, 12)
    assert time.monotonic() - start < 6


def test_a_journal_that_is_being_written_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even its last line, half of which is there: it isn't torn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with tracked_run(RunInfo("latents-1", "x"), patience=0):
        journal = tmp_path / "work/tracking/latents-1/journal.jsonl"
        with journal.open("ab") as stream:
            stream.write(b'{"op": "ta')
            stream.flush()
            assert send_pending() == (0, 0) and journal.read_bytes().endswith(b'"ta')
            stream.write(b'gs", "tags": {}}\n')
    assert [json.loads(line)["op"] for line in journal.read_text().splitlines()] == ["start", "tags", "end"]


def test_what_a_process_with_our_number_left_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In containers the same few numbers come again after every start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    start = {"op": "start", "key": "1", "name": "x", "parent": None, "time": 0, "pid": os.getpid()}
    Journal(tmp_path / "work/tracking/1").append(start | NOTHING)
    assert send_pending() == (1, 0)


def test_the_time_for_a_model_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.tracking.journal.REQUEST_SECONDS", 0.1)
    monkeypatch.setattr("flows.tracking.journal.UPLOAD_PATIENCE", 0.5)
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "unet.safetensors").write_bytes(bytes(1_000_000))
    journal = Journal(tmp_path / "journal")
    journal.append({"op": "model", "folders": {"model": str(weights)}})
    courier = Courier(journal, SlowServer(60), "server", first_wait=0.01)
    time.sleep(0.2)
    start = time.monotonic()
    assert not courier.close(patience=0.1)
    assert 0.9 < time.monotonic() - start < 3, "half a second, and as much for a megabyte"
