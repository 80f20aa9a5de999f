"""The literal command on the real local stack: servers and workers from wheels, in a clone.

The tests build on one another in this order: one stack serves all of them, and the last one takes it down.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from micro_project import ROOT
from servers import BIN
from stack_project import StackProject, running, take_environment

from flows.stages import PIPELINE, STAGES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackProject]:
    project = StackProject(tmp_path_factory.mktemp("stack") / "clone")
    project.preset("micro")
    project.preset("broken", sources__paths=["footage-that-is-not-there"])
    project.select("micro")
    with running(project):
        yield project


@pytest.fixture
def stack_env(project: StackProject, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables of the stack, set in this process, too."""
    return take_environment(project, monkeypatch)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_pool_is_checked_from_outside(project: StackProject, stack_env: dict[str, str]) -> None:
    said = project.run("svd", "platform", "check")
    assert said.count("passed") == 2 * 5 and "FAILED" not in said, said


def test_the_literal_command_runs_the_whole_pipeline_through_the_workers(
    project: StackProject, stack_env: dict[str, str]
) -> None:
    run = project.start_pipeline()
    done = project.wait(run, 2000)
    assert done["state_type"] == "COMPLETED", f"{project.said(run)}\n{project.logs()}"
    children = project.children(run)
    assert [c["name"] for c in children] == [f"{name}-micro" for name in PIPELINE]
    assert all(c["state_type"] == "COMPLETED" and c["deployment_id"] for c in children)
    assert [c["work_pool_name"] for c in children] == [STAGES[name].pool for name in PIPELINE]
    lock = (project.folder / "dvc.lock").read_text()
    assert all(f"outputs/micro/{name}" in lock for name in PIPELINE)
    assert (project.folder / "outputs/micro/report/report.html").is_file()
    client = mlflow.MlflowClient(stack_env["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([client.get_experiment_by_name("stable-video-diffusion").experiment_id])
    assert sorted(r.data.tags["stage"] for r in runs) == sorted([*PIPELINE, "full-pipeline"])
    assert {r.info.status for r in runs} == {"FINISHED"}
    (parent,) = [r.info.run_id for r in runs if r.data.tags["stage"] == "full-pipeline"]
    assert {r.data.tags.get("mlflow.parentRunId") for r in runs} == {parent, None}


def test_an_empty_clone_pulls_what_the_stages_pushed(
    project: StackProject, stack_env: dict[str, str], tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    for name in ("dvc.lock", "params.yaml", ".dvc/config.local", "presets/micro.yaml"):
        shutil.copy(project.folder / name, clone / name)
    pulled = ("outputs/micro/orbits", "outputs/micro/image-pretraining")
    subprocess.run([str(BIN / "dvc"), "pull", "-q", *pulled], cwd=clone, check=True)
    for name in pulled:
        assert files(clone / name) == files(project.folder / name) != {}


def test_files_with_secrets_are_private_and_status_shows_addresses(project: StackProject) -> None:
    for name in (".env", ".local/s3/secret", ".local/s3/s3.json"):
        assert stat.S_IMODE((project.folder / name).stat().st_mode) == 0o600
    said = project.run("svd", "stack", "status")
    for name in ("prefect", "mlflow", "s3", "worker-cpu", "worker-gpu", f"http://127.0.0.1:{project.ports['mlflow']}"):
        assert name in said


def test_nightly_runs_are_scheduled(project: StackProject) -> None:
    wanted = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    runs = project.ask("POST", "/flow_runs/filter", wanted)
    nightly = project.ask("GET", "/deployments/name/nightly-evaluation/nightly-evaluation")
    times = [run["expected_start_time"] for run in runs if run["deployment_id"] == nightly["id"]]
    assert len(times) >= 2 and all("T02:00:00" in time for time in times)
    queue = project.ask("GET", "/work_pools/cpu/queues/pipelines")
    assert nightly["work_queue_name"] == "pipelines" and queue["concurrency_limit"] == 1


def test_the_parent_fails_when_a_child_fails(project: StackProject) -> None:
    run = project.start_pipeline("preset=broken", 'stages=["sources"]')
    done = project.wait(run)
    assert done["state_type"] == "FAILED" and "stage 'sources' ended Failed" in done["state"]["message"]
    (child,) = project.children(run)
    assert child["state_type"] == "FAILED" and "footage-that-is-not-there" in child["state"]["message"]


def test_down_leaves_nothing_and_up_names_a_taken_port(project: StackProject) -> None:
    assert len(project.processes()) >= 5
    said = project.run("svd", "stack", "down")
    assert all(name in said for name in ("prefect", "mlflow", "s3", "worker-cpu", "worker-gpu"))
    assert project.processes() == []
    assert not (project.folder / ".env").exists()
    assert project.run("svd", "stack", "status").strip() == "nothing is running"
    assert "remote" not in project.run("dvc", "config", "--list")
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", project.ports["mlflow"]))
        holder.listen()
        said = project.run("svd", "stack", "up", "--mlflow", str(project.ports["mlflow"]), check=False)
    assert f"is taken by process {os.getpid()}" in " ".join(said.split()) and "Traceback" not in said
    assert project.processes() == []
