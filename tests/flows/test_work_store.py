"""Work in progress in the store: the last whole snapshot comes back, and an evicted stage goes on where it was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from small_project import make_project

from flows.recording import work_store
from flows.recording.work_store import Mirror, mirrored, read_snapshot, restore
from svd import storage
from svd.core.retries import Unreachable
from svd.storage import s3


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else str(request.getfixturevalue("bucket"))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder with the parts of a training, and what must not travel."""
    monkeypatch.chdir(tmp_path)
    folder = Path("work/tiny/orbits/0123")
    for name in ("code.sha256", "phase-0/step=3.ckpt/a", "phase-0/step=3.ckpt/b", "phase-0/.half.tmp", ".lock"):
        write(folder / name, name)
    write(folder.with_name("0123.run"), "orbits-key")
    write(folder / "published" / "orbit.txt", "")
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def files(folder: Path) -> dict[str, str]:
    found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix(): p.read_text() for p in found}


def elsewhere(work: Path) -> None:
    """From now on this is an empty machine."""
    shutil.rmtree("work")


def objects(uri: str) -> int:
    return sum(not Path(e.location).name.startswith(".") for e in storage.list_files(f"{uri}/objects"))


def test_a_snapshot_comes_back_on_an_empty_machine(root: str, work: Path) -> None:
    uri = work_store.work_uri(root, work)
    Mirror(work, uri).snapshot()
    elsewhere(work)
    restore(work, uri)
    assert files(work) == {name: name for name in ("code.sha256", "phase-0/step=3.ckpt/a", "phase-0/step=3.ckpt/b")}
    assert work.with_name("0123.run").read_text() == "orbits-key"


def test_only_changes_travel_and_what_is_no_longer_named_goes(
    root: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, sent = work_store.work_uri(root, work), []
    plain = storage.upload
    monkeypatch.setattr(storage, "upload", lambda path, location: (sent.append(path.name), plain(path, location)))
    mirror = Mirror(work, uri)
    mirror.snapshot()
    write(work / "phase-0/step=6.ckpt/a", "six")
    shutil.rmtree(work / "phase-0/step=3.ckpt")
    mirror.snapshot()
    assert sent == ["code.sha256", "a", "b", "a"] and objects(uri) == 2
    assert set(read_snapshot(uri).files) == {"code.sha256", "phase-0/step=6.ckpt/a"}


def test_a_checkpoint_that_is_pruned_meanwhile_stays_as_it_was(
    root: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = work_store.work_uri(root, work)
    mirror = Mirror(work, uri)
    mirror.snapshot()
    for name in "ab":
        write(work / f"phase-0/step=3.ckpt/{name}", f"newer {name}")
    write(work / "phase-0/step=6.ckpt/a", "six")
    plain = storage.upload

    def prune_before_b(path: Path, location: str) -> None:
        if path.name == "b":
            path.unlink()
        plain(path, location)

    monkeypatch.setattr(storage, "upload", prune_before_b)
    mirror.snapshot()
    elsewhere(work)
    restore(work, uri)
    assert files(work)["phase-0/step=3.ckpt/a"] == "phase-0/step=3.ckpt/a", "a checkpoint of two versions"
    assert files(work)["phase-0/step=6.ckpt/a"] == "six"


def test_a_kill_leaves_the_last_whole_snapshot(root: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = work_store.work_uri(root, work)
    mirror = Mirror(work, uri)
    mirror.snapshot()
    before = files(work)
    write(work / "phase-0/step=6.ckpt/a", "six")

    def killed(*arguments: object) -> str:
        raise KeyboardInterrupt

    for name in ("upload", "replace"):
        with monkeypatch.context() as inside, pytest.raises(KeyboardInterrupt):
            inside.setattr(storage, name, killed)
            mirror.snapshot()
    elsewhere(work)
    restore(work, uri)
    assert files(work) == {name: text for name, text in before.items() if not name.startswith("published")}


def test_what_is_damaged_in_the_store_costs_its_part_alone(root: str, work: Path) -> None:
    uri = work_store.work_uri(root, work)
    write(work / "phase-0/step=6.ckpt/a", "six")
    Mirror(work, uri).snapshot()
    digest = read_snapshot(uri).files["phase-0/step=3.ckpt/a"]["sha256"]
    storage.write_bytes(f"{uri}/objects/{digest}", b"bits have rotted")
    elsewhere(work)
    restore(work, uri)
    assert files(work) == {"code.sha256": "code.sha256", "phase-0/step=6.ckpt/a": "six"}


def test_what_is_newer_here_stays_and_what_is_newer_there_comes(root: str, work: Path) -> None:
    uri = work_store.work_uri(root, work)
    Mirror(work, uri).snapshot()
    write(work / "here", "after the snapshot")
    restore(work, uri)
    assert "here" in files(work)
    shutil.copytree("work", "first machine")
    write(work / "there", "by another machine, later")
    Mirror(work, uri).snapshot()
    elsewhere(work)
    Path("first machine").rename("work")
    restore(work, uri)
    assert "there" in files(work)


def test_of_two_writers_the_later_one_goes_on(root: str, work: Path) -> None:
    uri = work_store.work_uri(root, work)
    first = Mirror(work, uri)
    first.snapshot()
    Mirror(work, uri)
    write(work / "late", "by one that was taken for dead")
    with pytest.raises(storage.Conflict):
        first.snapshot()
    assert "late" not in read_snapshot(uri).files


def test_a_writer_that_slept_over_the_take_over_removes_nothing(
    root: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still between its manifest and the removal of what that no longer names."""
    uri = work_store.work_uri(root, work)
    first = Mirror(work, uri)
    first.snapshot()
    shutil.rmtree(work / "phase-0/step=3.ckpt")
    write(work / "phase-0/step=6.ckpt/a", "six")
    plain = storage.replace

    def then_sleep(location: str, data: bytes, expected: str | None) -> str:
        monkeypatch.setattr(storage, "replace", plain)
        version = plain(location, data, expected)
        shutil.copytree("work", "second/work")
        with monkeypatch.context() as machine:
            machine.chdir("second")
            write(work / "phase-0/step=9.ckpt/a", "nine")
            Mirror(work, uri).snapshot()
        return version

    monkeypatch.setattr(storage, "replace", then_sleep)
    first.snapshot()
    elsewhere(work)
    restore(work, uri)
    assert files(work)["phase-0/step=9.ckpt/a"] == "nine" and objects(uri) == len(files(work))


def test_who_takes_over_outlives_the_last_word_of_the_other(
    root: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = work_store.work_uri(root, work)
    first = Mirror(work, uri)
    plain = storage.replace

    def after_the_first(location: str, data: bytes, expected: str | None) -> str:
        monkeypatch.setattr(storage, "replace", plain)
        first.snapshot()
        return plain(location, data, expected)

    monkeypatch.setattr(storage, "replace", after_the_first)
    write(work / "late", "of the second")
    Mirror(work, uri).snapshot()
    assert "late" in read_snapshot(uri).files


def test_a_large_file_that_grows_costs_the_others_no_snapshot(
    bucket: str, work: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, plain = work / "phase-1/large", s3._complete
    write(large, "x" * (6 << 20))

    def grow(*arguments: Any) -> None:
        with large.open("a") as stream:
            stream.write("more")
        plain(*arguments)

    monkeypatch.setattr(s3, "_complete", grow)
    uri = work_store.work_uri(bucket, work)
    Mirror(work, uri).snapshot()
    assert set(read_snapshot(uri).files) == {"code.sha256", "phase-0/step=3.ckpt/a", "phase-0/step=3.ckpt/b"}


def test_publishing_does_not_empty_the_snapshot(root: str, work: Path) -> None:
    uri = work_store.work_uri(root, work)
    with mirrored(work, uri) as mirror:
        mirror.snapshot()
        shutil.rmtree(work / "phase-0")  # what was finished is now the output
        write(work / "published.json", "{}")
    assert "phase-0/step=3.ckpt/a" in read_snapshot(uri).files
    work_store.deliver(work, uri, "0123.dir")
    assert set(read_snapshot(uri).files) == {"published.json", "code.sha256"} and objects(uri) == 2
    work_store.forget_recorded(root, "tiny", "orbits", "other.dir")
    assert read_snapshot(uri).output == "0123.dir"
    work_store.forget_recorded(root, "tiny", "orbits", "0123.dir")
    assert [e for e in storage.list_files(f"{root}/work") if not Path(e.location).name.startswith(".")] == []


def test_a_stage_that_fails_leaves_its_last_state(root: str, work: Path) -> None:
    uri = work_store.work_uri(root, work)
    with pytest.raises(ZeroDivisionError), mirrored(work, uri):
        write(work / "last", "just before the failure")
        raise ZeroDivisionError
    assert "last" in read_snapshot(uri).files


def test_a_store_that_is_away_stops_no_stage(work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SVD_SNAPSHOT_SECONDS", "0.05")
    uri = work_store.work_uri(str(tmp_path / "store"), work)
    tried = threading.Event()

    def away(path: Path, location: str) -> None:
        tried.set()
        raise Unreachable("does not answer")

    with mirrored(work, uri):
        with monkeypatch.context() as inside:
            inside.setattr(storage, "upload", away)
            assert tried.wait(20)
        deadline = time.monotonic() + 20
        while not read_snapshot(uri).files and time.monotonic() < deadline:
            time.sleep(0.05)
        assert read_snapshot(uri).files, "it goes on when the store is back"


STAGE = """
import os, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from flows.running import runner
from flows.stages import Stage
from svd.config.load import load_preset
from svd.core.files import write_text
from svd.stage import Report, publish

def run(context):
    parts = context.work / "parts"
    for number in range(8):
        if not (parts / f"{number}.txt").exists():
            print("part", number, flush=True)
            write_text(parts / f"{number}.txt", f"part {number}\\n")
            time.sleep(float(sys.argv[3]))
    finished = context.work / "finished"
    write_text(finished / "all.txt", "".join((parts / f"{n}.txt").read_text() for n in range(8)))
    return publish(finished, context.output, Report({"parts": 8}, "8 parts"))

Stage.load = lambda self: run
runner.run_preset_stage("orbits", load_preset("tiny"), store_option=sys.argv[2])
"""


def start(machine: Path, root: str, pause: float, **env: str) -> subprocess.Popen[str]:
    """Run a stage of eight parts on a machine, a new process."""
    command = [sys.executable, "-c", STAGE, str(Path(__file__).parents[1]), root, str(pause)]
    return subprocess.Popen(command, cwd=machine, env=os.environ | env, text=True, stdout=subprocess.PIPE)


@pytest.mark.slow  # 40 s each: a stage killed, and again undisturbed
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_evicted_stage_goes_on_on_an_empty_machine(
    number: signal.Signals, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = {"SVD_LEASE_BEAT": "1"}
    machines = [tmp_path / name for name in ("first", "second", "undisturbed")]
    for machine in machines:
        machine.mkdir()
        make_project(machine, monkeypatch)
    often = "0.2" if number == signal.SIGKILL else "1000"  # SIGTERM takes a snapshot itself
    first = start(machines[0], bucket, 1.0, SVD_SNAPSHOT_SECONDS=often, **beats)
    assert first.stdout
    while first.stdout.readline().strip() != "part 4":
        assert first.poll() is None
    first.send_signal(number)
    first.wait(60)
    shutil.rmtree(machines[0])
    second = start(machines[1], bucket, 0.0, **beats)
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0
    done = [int(line.split()[1]) for line in said.splitlines() if line.startswith("part")]
    assert done == list(range(done[0], 8)) and done[0] >= 4, done
    alone = start(machines[2], str(tmp_path / "other store"), 0.0, **beats)
    assert alone.wait(120) == 0
    made = Path("outputs/tiny/orbits/all.txt")
    assert (machines[1] / made).read_bytes() == (machines[2] / made).read_bytes()
    assert not [e for e in storage.list_files(f"{bucket}/work") if not Path(e.location).name.startswith(".")]
