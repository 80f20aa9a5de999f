"""A stage that outgrows the scratch volume of its pod ends with one line, before the kubelet evicts it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import yaml
from main_or_thread import do_in

from flows.running import scratch
from flows.running.interrupt import interruptible
from flows.running.scratch import bytes_of, used_bytes, within_scratch
from svd.core.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A volume of 256 KiB."""
    (tmp_path / "size").write_text("256Ki\n")
    monkeypatch.setattr(scratch, "SIZE", tmp_path / "size")
    monkeypatch.setattr(scratch, "CHECK_SECONDS", 0.05)
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume"


@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_full_volume_ends_the_work_in_one_line(where: str, volume: Path) -> None:
    said: list[str] = []

    def work() -> None:
        try:
            with within_scratch(volume):
                (volume / "checkpoint").write_bytes(os.urandom(300 << 10))
                for _ in range(300):
                    time.sleep(0.1)
        except UserError as error:
            said.append(str(error))

    do_in(where, work)
    assert len(said) == 1 and "scratch volume (256Ki)" in said[0] and "raise `scratch_size`" in said[0]


def test_what_fits_is_left_alone(volume: Path) -> None:
    with within_scratch(volume):
        (volume / "deep").mkdir()
        (volume / "deep" / "part").write_bytes(os.urandom(200 << 10))
        os.link(volume / "deep" / "part", volume / "again")  # as DVC links an output into its cache
        (volume / "sparse").touch()
        os.truncate(volume / "sparse", 1 << 30)
        time.sleep(0.5)
        assert 200 << 10 <= used_bytes(volume) < 240 << 10


def test_a_file_that_goes_during_a_walk_hides_no_other(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files come and go while a stage works."""
    for name in ("first", "second"):
        (volume / name).mkdir()
        (volume / name / "checkpoint").write_bytes(os.urandom(100 << 10))
    plain = os.scandir

    class Scanned:
        """Lists a file that is gone before all others."""

        def __init__(self, path: str) -> None:
            (Path(path) / "gone.tmp").touch()
            with plain(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name != "gone.tmp")
            (Path(path) / "gone.tmp").unlink()

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            """Nothing is open."""

    monkeypatch.setattr(os, "scandir", Scanned)
    assert used_bytes(volume) >= 200 << 10


def test_a_block_that_has_ended_is_not_interrupted(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what this thread does next, when the walk ends only then."""
    walking, done = threading.Event(), threading.Event()

    def slow(folder: Path) -> int:
        walking.set()
        done.wait(20)
        return 300 << 10

    monkeypatch.setattr(scratch, "used_bytes", slow)
    with interruptible():
        with within_scratch(volume):
            assert walking.wait(20)
        done.set()
        time.sleep(0.5)


def test_a_walk_that_takes_long_is_taken_seldom(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[Path] = []

    def slow(folder: Path) -> int:
        walks.append(folder)
        time.sleep(0.1)
        return 0

    monkeypatch.setattr(scratch, "used_bytes", slow)
    with within_scratch(volume):
        time.sleep(2)  # with CHECK_SECONDS alone: 13 walks
    assert len(walks) == 1


def test_outside_a_pod_nothing_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "SIZE", tmp_path / "missing")
    before = set(threading.enumerate())
    with within_scratch(tmp_path):
        assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "scratch"]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("200Gi", 200 << 30),
        ("0.5Ti", 1 << 39),
        ("12M", 12_000_000),
        ("800", 800),
        ("1k", 1000),
        ("2E", 2 * 10**18),
        ("1.5e3", 1500),
    ],
)
def test_quantities_are_kubernetes_own(text: str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "Gi", "5 GB", "ten", "1e", "1.2.3", "3x9"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no quantity"):
        bytes_of(text)


def test_a_pod_knows_the_size_of_its_volume() -> None:
    pools = yaml.safe_load((ROOT / "infra/prefect/kubernetes-pools.yaml").read_text())
    pod = pools["template"]["job_configuration"]["job_manifest"]["spec"]["template"]
    (path,) = [mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"] if mount["name"] == "pod"]
    (volume,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "pod"]
    (item,) = volume["downwardAPI"]["items"]
    assert Path(path, item["path"]) == scratch.SIZE
    annotation = item["fieldRef"]["fieldPath"].split("'")[1]
    assert pod["metadata"]["annotations"][annotation] == "{{ scratch_size }}"
