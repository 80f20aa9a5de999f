"""A real MLflow server on S3 artifacts that is killed, or hangs, while a run logs: nothing lost, nothing doubled."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from servers import S3Server, Server, free_ports, mlflow_server

from flows.tracking.runs import RunInfo, send_pending, tracked_run
from svd import storage

pytestmark = pytest.mark.slow
STEPS = 120


@pytest.fixture
def server(bucket: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    port = free_ports(1)[0]
    server = mlflow_server(tmp_path / "mlflow", port, f"{bucket}/mlflow", s3_server.environment())
    server.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    yield server
    server.stop()


def the_run(key: str) -> mlflow.entities.Run:
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("stable-video-diffusion")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`svd.run_key` = '{key}'")
    return run


def assert_everything_once(run: mlflow.entities.Run, bucket: str) -> None:
    client = mlflow.MlflowClient()
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(i, float(i)) for i in range(STEPS)]
    names = [a.path for a in client.list_artifacts(run.info.run_id, "samples")]
    assert names == ["samples/clip.mp4"]
    pictures = [a.path for a in client.list_artifacts(run.info.run_id, "images")]
    assert len(pictures) == 2 * 4
    stored = [entry for entry in storage.list_files(f"{bucket}/mlflow") if entry.relative.endswith("clip.mp4")]
    assert [entry.size for entry in stored] == [3_000_000]


def test_a_server_that_is_stopped_and_started_again(
    server: Server, bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"x" * 3_000_000)
    info = RunInfo("stage-1", "stage", "pipeline-1", {"stage": "x"}, {"a": {"b": 1}})
    with tracked_run(info, patience=60) as tracker:
        for step in range(STEPS):
            tracker.log_metrics({"loss": float(step)}, step)
            if step % 30 == 0:
                tracker.log_image("samples/grid", np.full((32, 32, 3), step, np.uint8), step)
            if step == 30:
                time.sleep(3)  # the courier delivers what there is so far
                server.kill()
                tracker.log_file(tmp_path / "clip.mp4", "samples")
            if step == 90:
                time.sleep(5)
                server.start()
            time.sleep(0.01)
    said = caplog.text
    assert "can't be reached" in said and "answers again" in said
    run = the_run("stage-1")
    assert run.info.status == "FINISHED" and run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert run.data.tags["mlflow.parentRunId"] == the_run("pipeline-1").info.run_id
    assert_everything_once(run, bucket)


def test_a_server_that_hangs_holds_nothing_up(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    (tmp_path / "clip.mp4").write_bytes(b"x" * 3_000_000)
    with tracked_run(RunInfo("stage-2", "stage"), patience=1) as tracker:
        for step in range(STEPS):
            tracker.log_metrics({"loss": float(step)}, step)
            if step % 30 == 0:
                tracker.log_image("samples/grid", np.full((32, 32, 3), step, np.uint8), step)
            if step == 30:
                time.sleep(3)
                server.kill(signal.SIGSTOP)
                tracker.log_file(tmp_path / "clip.mp4", "samples")
    waiting = list((tmp_path / "work" / "tracking").glob("*/journal.jsonl"))
    assert len(waiting) == 1, "the hanging server was taken for an answering one"
    server.kill(signal.SIGCONT)
    time.sleep(1)
    assert send_pending() == (1, 0)
    assert_everything_once(the_run("stage-2"), bucket)
    assert send_pending() == (0, 0)
