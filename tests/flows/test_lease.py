"""Leases: one executor over machines, a dead one is replaced, one that comes back stops and publishes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from main_or_thread import do_in
from small_project import make_project

from flows.recording.results_store import LeaseLost, stored_output
from flows.running import lease
from flows.running.lease import held
from svd import storage
from svd.core.errors import UserError
from svd.core.processes import process_name
from svd.core.retries import Unreachable


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else str(request.getfixturevalue("bucket"))


BEAT = 1.0  # seconds; a lease is lost after three, which a busy machine must not make us stand still


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVD_LEASE_BEAT", str(BEAT))


def record(root: str, name: str = "curation") -> dict[str, object]:
    found: dict[str, object] = json.loads(storage.read_bytes(f"{root}/leases/tiny/{name}.json"))
    return found


def test_the_token_grows_and_a_released_lease_is_free_at_once(root: str) -> None:
    for token in (1, 2, 3):
        with held(root, "tiny", "curation") as mine:
            assert mine.fence.token == token and not mine.waited
            assert record(root)["owner"] == mine.owner
        assert (record(root)["owner"], record(root)["token"]) == ("", token)


def test_it_is_renewed(root: str) -> None:
    with held(root, "tiny", "curation") as mine:
        before = record(root)["beat"]
        time.sleep(2.5 * BEAT)
        assert int(str(record(root)["beat"])) > int(str(before))
        mine.check()


def test_a_second_one_waits_and_says_who_holds_it(root: str, caplog: pytest.LogCaptureFixture) -> None:
    order: list[str] = []

    def second() -> None:
        with held(root, "tiny", "curation") as theirs:
            order.append(f"second {theirs.fence.token} {theirs.waited}")

    with held(root, "tiny", "curation") as mine, held(root, "tiny", "orbits"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(2 * BEAT)  # a live holder is never taken over
        order.append("first ends")
    thread.join(20)
    assert order == ["first ends", "second 2 True"]
    said = [line for line in caplog.messages if "waiting for it" in line]
    assert len(said) == 1 and mine.owner in said[0]


def test_a_killed_process_of_this_machine_is_replaced_at_once(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        f"from flows.running.lease import held\nwith held({root!r}, 'tiny', 'curation'): print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline()
        holder.kill()
    monkeypatch.setenv("SVD_LEASE_BEAT", "1000")
    with held(root, "tiny", "curation") as mine:
        assert mine.fence.token == 2 and not mine.waited


def test_a_holder_of_another_machine_is_replaced_when_it_was_silent(root: str) -> None:
    silent = {"token": 7, "owner": "elsewhere:1:0", "beat": 3, "process": "another boot/pid:[1]/1/1"}
    storage.write_bytes(f"{root}/leases/tiny/curation.json", json.dumps(silent).encode())
    began = time.monotonic()
    with held(root, "tiny", "curation") as mine:
        assert mine.fence.token == 8
    assert time.monotonic() - began >= 4.5 * BEAT


@pytest.mark.parametrize("where", ["main", "thread"])
def test_who_finds_another_holder_is_stopped_in_the_middle(root: str, where: str) -> None:
    outcome: list[str] = []

    def work() -> None:
        began = time.monotonic()
        try:
            with held(root, "tiny", "curation") as mine:
                child = subprocess.Popen(["sleep", "60"])
                seen = storage.version(mine.location)
                thief = {"token": 9, "owner": "thief:1:0", "beat": 1}
                while True:
                    try:
                        storage.replace(mine.location, json.dumps(thief).encode(), seen)
                        break
                    except storage.Conflict:
                        seen = storage.version(mine.location)
                if where == "main":
                    time.sleep(60)
                for _ in range(600):
                    time.sleep(0.1)
        except LeaseLost as error:
            outcome.append(str(error))
        assert child.wait(5) == -signal.SIGTERM
        outcome.append("stopped" if time.monotonic() - began < 30 else "too late")

    do_in(where, work)
    assert "lost to thief:1:0" in outcome[0] and outcome[-1] == "stopped" and len(outcome) == 2
    assert record(root)["owner"] == "thief:1:0", "a lost lease isn't released"


def test_a_store_that_is_away_for_too_long_stops_the_holder(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*arguments: object) -> str:
        raise Unreachable("does not answer")

    began = time.monotonic()
    with pytest.raises(LeaseLost, match="not renewed for 3 s"), held(root, "tiny", "curation"):
        monkeypatch.setattr(storage, "replace", away)
        time.sleep(60)
    assert 3 * BEAT < time.monotonic() - began < 30


@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_stage_can_not_take_its_end_for_the_failure_of_a_source(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Exception] = []
    outcome: list[str] = []

    def away(*arguments: object) -> str:
        raise Unreachable("does not answer")

    def work() -> None:
        try:
            with held(str(tmp_path / "store"), "tiny", "curation"):
                monkeypatch.setattr(storage, "replace", away)
                for _ in range(200):
                    try:
                        time.sleep(0.1)
                    except Exception as error:  # and on to the next source
                        taken.append(error)
                outcome.append("went on")
        except LeaseLost as error:
            outcome.append(str(error))

    do_in(where, work)
    assert not taken and len(outcome) == 1 and "not renewed for 3 s" in outcome[0]


def test_a_clock_that_is_set_makes_no_living_holder_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day at which a process began moves with the clock: NTP sets it some time after a boot."""
    here = {"process": process_name(os.getpid())}
    plain = psutil._pslinux.boot_time
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: plain() + 2)
    assert not lease._is_dead(here)


def test_a_holder_that_beats_slower_than_its_observer_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = str(tmp_path / "store/leases/tiny/curation.json")
    slow = {"token": 7, "owner": "elsewhere:1:0", "beat": 3, "process": "another boot/pid:[1]/1/1", "seconds": 1.0}
    storage.write_bytes(location, json.dumps(slow).encode())
    monkeypatch.setenv("SVD_LEASE_BEAT", "0.1")
    began = time.monotonic()
    with held(str(tmp_path / "store"), "tiny", "curation"):
        assert time.monotonic() - began >= 4.5


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_pace_that_is_no_number_of_seconds_is_one_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVD_LEASE_BEAT", text)
    with pytest.raises(UserError, match=f"SVD_LEASE_BEAT is '{text}'; give seconds, for example 20"):
        held(str(tmp_path / "store"), "tiny", "curation").__enter__()


def test_two_leases_that_are_lost_together_interrupt_once(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned = []

    def away(*arguments: object) -> str:
        raise Unreachable("does not answer")

    lost = pytest.raises(LeaseLost, match="stops and publishes nothing")
    with lost, held(root, "tiny", "pipeline"), held(root, "tiny", "curation"):
        monkeypatch.setattr(storage, "replace", away)
        try:
            time.sleep(60)
        finally:
            time.sleep(2 * BEAT)
            cleaned.append("all")
    assert cleaned == ["all"]


def test_a_store_that_ignores_conditions_is_refused(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_checked", set())
    monkeypatch.setattr(storage, "replace", lambda at, data, expected: storage.write_bytes(at, data) or "any")
    with pytest.raises(UserError, match="ignores conditional writes"), held(root, "tiny", "curation"):
        raise AssertionError("served")


STAGE = """
import sys, time
from pathlib import Path
from flows.running import runner
from flows.stages import Stage
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.core.processes import process_name
from svd.core.files import write_text
from svd.stage import Report, publish

def run(context):
    print("running", flush=True)
    deadline = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < deadline and not Path("go on").exists():
        time.sleep(0.1)
    finished = context.work / "finished"
    write_text(finished / "by.txt", sys.argv[3])
    return publish(finished, context.output, Report({"n": 1}, "ran"))

Stage.load = lambda self: run
try:
    print(runner.run_preset_stage("orbits", load_preset("tiny"), store_option=sys.argv[1]).summary, flush=True)
except UserError as error:
    print(f"error: {error}", flush=True)
    sys.exit(1)
"""


def start(machine: Path, root: str, seconds: float, content: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STAGE, root, str(seconds), content]
    return subprocess.Popen(
        command, cwd=machine, env=os.environ.copy(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two machines: projects that share nothing but the store."""
    monkeypatch.setenv("SVD_LEASE_BEAT", "1")
    found = [tmp_path / "first", tmp_path / "second"]
    for machine in found:
        machine.mkdir()
        make_project(machine, monkeypatch)
    return found


def until_running(process: subprocess.Popen[str]) -> None:
    assert process.stdout and process.stdout.readline() == "running\n"


@pytest.mark.slow
def test_a_stage_that_two_machines_start_runs_once(machines: list[Path], bucket: str) -> None:
    first = start(machines[0], bucket, 1000, "result")
    until_running(first)
    second = start(machines[1], bucket, 0, "result")
    assert second.stderr
    while "waiting for it" not in second.stderr.readline():
        assert second.poll() is None
    (machines[0] / "go on").touch()
    assert first.communicate(timeout=120)[0].endswith("ran\n")
    said, _ = second.communicate(timeout=120)
    assert "running" not in said and "made by another executor" in said, said
    assert (machines[1] / "outputs/tiny/orbits/by.txt").read_text() == "result"


@pytest.mark.slow  # half a minute
def test_one_that_was_cut_off_publishes_nothing_when_it_comes_back(machines: list[Path], bucket: str) -> None:
    first = start(machines[0], bucket, 3, "by the first")
    until_running(first)
    first.send_signal(signal.SIGSTOP)
    try:
        before = json.loads(storage.read_bytes(f"{bucket}/leases/tiny/orbits.json"))
        second = start(machines[1], bucket, 0, "by the second")
        until_running(second)
        assert second.communicate(timeout=120)[0].endswith("ran\n")
    finally:
        first.send_signal(signal.SIGCONT)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 1 and "error: lease of 'orbits' lost" in said and said.count("\n") == 1, said
    os.chdir(machines[1])
    output = stored_output(bucket, "tiny", "orbits")
    listing = json.loads(storage.read_bytes(f"{bucket}/dvc/files/md5/{output.md5[:2]}/{output.md5[2:]}"))  # type: ignore[union-attr]
    (md5,) = [item["md5"] for item in listing if item["relpath"] == "by.txt"]
    assert storage.read_bytes(f"{bucket}/dvc/files/md5/{md5[:2]}/{md5[2:]}") == b"by the second"
    after = json.loads(storage.read_bytes(f"{bucket}/leases/tiny/orbits.json"))
    assert after["token"] == before["token"] + 1


def test_a_living_process_that_proc_hides_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `hidepid` /proc shows no process of another user, who may hold the lease on the same machine."""
    here, names = process_name(os.getpid()), process_name
    monkeypatch.setattr(lease, "process_name", lambda pid: names(pid) if pid == os.getpid() else "")
    with subprocess.Popen(["sleep", "60"]) as holder:
        place = "/".join([*here.split("/")[:2], str(holder.pid), "1"])
        assert not lease._is_dead({"process": place})
        holder.kill()
    assert lease._is_dead({"process": place})
