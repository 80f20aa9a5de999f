"""A pipeline that was interrupted: what it goes on with, under which MLflow run, and what its log says of mistakes."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, get_run_logger
from prefect.testing.utilities import prefect_test_harness
from small_project import draw, make_project, refuse, use
from toy_training import FRAMES, write_cache

from flows.prefect_flows.full_pipeline import full_pipeline, pipeline_key
from flows.recording import dvc as versioning
from flows.recording import results_store
from flows.recording.results_store import LeaseExpired
from svd import storage
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.core.retries import Unreachable
from svd.latents.batches import Buckets, IndexedLoader
from svd.latents.cache import LatentCache
from svd.latents.loader import Draws, Examples
from svd.stage import Report


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=240):
        yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_project(tmp_path, monkeypatch)


@flow
def count_batches(folder: Path) -> int:
    get_run_logger().info("begins")
    cache = LatentCache(folder)
    examples = Examples(cache, cache.index.rows, FRAMES, Draws(7, -1.2, 1.0))
    return len(list(IndexedLoader(Buckets([examples], [4], 7), 5, num_workers=2)))


def test_processes_that_load_batches_end_well_in_a_flow(prefect_server: None, tmp_path: Path) -> None:
    """A fork of a process in which Prefect sends logs ends with status 1, on which torch ends the training."""
    assert count_batches(write_cache(tmp_path)) == 5


record = versioning.record


def die(name: str, *given: Any) -> None:
    if name == "orbits":
        raise KeyboardInterrupt
    record(name, *given)


def test_what_was_not_recorded_is_not_computed_again(
    prefect_server: None, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = use(monkeypatch, draw)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(versioning, "record", die)
        with pytest.raises(KeyboardInterrupt):
            full_pipeline(preset="tiny", stages=["orbits"])
    assert "outputs/tiny/orbits" not in (project / "dvc.lock").read_text()
    shutil.rmtree(project / "outputs")  # what `dvc repro` does before it runs the stage again
    assert full_pipeline(preset="tiny", stages=["orbits"])["ran"] == ["orbits"]
    assert len(calls) == 1
    assert (project / "outputs/tiny/orbits/orbit.txt").read_text() == f"{load_preset('tiny').orbits.objects} objects\n"
    assert not list((project / "work/tiny").glob("orbits*"))


def test_a_mistake_is_logged_without_a_traceback(
    prefect_server: None, project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, refuse)
    full_pipeline(preset="tiny", stages=["orbits"], return_state=True)
    told = [record for record in caplog.records if "mesh.glb" in record.getMessage()]
    assert told and not any(record.exc_info or record.exc_text for record in told)


def test_only_a_killed_pipeline_is_continued_under_its_key(project: Path) -> None:
    preset = load_preset("tiny")
    with pytest.raises(RuntimeError), pipeline_key(preset, ["orbits"], False) as first:
        raise RuntimeError("failed")
    with pipeline_key(preset, ["orbits"], False) as second:
        (path,) = (project / "work/tiny").glob(".full-pipeline-*.run")
        left = path.read_text()
        with pytest.raises(UserError, match="is being run by process"), pipeline_key(preset, ["orbits"], False):
            pytest.fail("two at once")
        with pipeline_key(preset, ["orbits", "report"], False) as other:
            assert other != second
    assert first != second and not path.exists()
    path.write_text(left)  # as SIGKILL leaves it
    with pytest.raises(LeaseExpired), pipeline_key(preset, ["orbits"], False) as third:
        assert third == second
        raise LeaseExpired("the store was away")
    with pipeline_key(preset, ["orbits"], False) as fourth:
        assert fourth == second


def test_a_pipeline_outlives_a_store_that_was_away(
    prefect_server: None, project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its lease expires while a stage is at work; when the store answers again, the stage is run to its end."""
    monkeypatch.setenv("SVD_LEASE_BEAT", "0.5")
    replace, away = storage.replace, threading.Event()

    def answer(*given: Any) -> str:
        if away.is_set():
            raise Unreachable("does not answer")
        return replace(*given)

    def outlast(context: Any) -> Report:
        if not calls[1:]:
            away.set()
            threading.Timer(4, away.clear).start()
            time.sleep(60)
        return draw(context)

    calls = use(monkeypatch, outlast)
    monkeypatch.setattr(storage, "replace", answer)
    done = full_pipeline(preset="tiny", stages=["orbits"], store=str(project / "store"))
    assert done["ran"] == ["orbits"] and len(calls) == 2
    assert "not renewed for 2 s" in caplog.text and "goes on when the store answers" in caplog.text
    assert results_store.stored_output(str(project / "store"), "tiny", "orbits")
