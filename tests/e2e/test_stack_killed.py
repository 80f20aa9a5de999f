"""The local stack, with servers and workers killed while a stage trains: nothing is lost, nothing told twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from stack_project import StackProject, running, take_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
STEPS = 150
TRAINING = ("preset=training", 'stages=["encoders"]', "force=true")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackProject]:
    project = StackProject(tmp_path_factory.mktemp("killed") / "clone")
    project.preset("training", encoders__toy_iterations=STEPS)
    project.select("training")
    with running(project):
        yield project


@pytest.fixture(autouse=True)
def stack_env(project: StackProject, monkeypatch: pytest.MonkeyPatch) -> None:
    take_environment(project, monkeypatch)


def start_training(project: StackProject) -> tuple[str, dict[str, Any], Path]:
    """Start the training of the encoders in the pool `gpu`; returns once it wrote a checkpoint and logged a loss."""
    run = project.start_pipeline(*TRAINING)
    child = project.wait_until(lambda: [c for c in project.children(run) if c["state_type"] == "RUNNING"])[0]
    work, spool = project.folder / "work" / "training" / "encoders", project.folder / "work" / "tracking"
    journal = project.wait_until(lambda: next(spool.glob("encoders*/journal.jsonl"), None))
    project.wait_until(lambda: any(work.glob("*/*.pt")) and '"loss"' in journal.read_text())
    return run, child, journal


def assert_each_step_once(child: str) -> None:
    """MLflow has one finished run of the training, with the loss of each step, once."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("stable-video-diffusion").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`prefect.flow_run_id` = '{child}'")
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == list(range(STEPS))


def test_mlflow_is_killed_in_training(project: StackProject) -> None:
    run, child, journal = start_training(project)
    project.kill("mlflow")
    known = len(journal.read_bytes())
    project.wait_until(lambda: not journal.exists() or len(journal.read_bytes()) > known + 1000)
    project.up()
    assert project.wait(run)["state_type"] == "COMPLETED", project.logs()
    assert "can't be reached" in project.said(child["id"])
    project.run("svd", "track", "flush")
    assert_each_step_once(child["id"])


def test_the_prefect_server_is_killed_in_training(project: StackProject) -> None:
    run, child, _ = start_training(project)
    project.kill("prefect")
    project.up()
    assert project.wait(run)["state_type"] == "COMPLETED", project.logs()
    assert [(c["id"], c["state_type"]) for c in project.children(run)] == [(child["id"], "COMPLETED")]
    assert_each_step_once(child["id"])


def test_a_worker_dies_with_its_stage_and_another_goes_on(project: StackProject) -> None:
    project.silence(90)
    run, child, _ = start_training(project)
    project.kill("worker-gpu")
    project.up()
    assert project.wait(run)["state_type"] == "COMPLETED", project.logs()
    first, second = project.children(run)
    assert (first["id"], first["state_type"]) == (child["id"], "CRASHED")
    assert second["state_type"] == "COMPLETED" and "starting it again" in project.said(run)
    assert_each_step_once(second["id"])
