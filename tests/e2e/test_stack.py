"""The literal command on the real local stack: servers and workers from wheels, in a clone, with failures and restarts.

The tests build on one another in this order: one stack serves all of them, and the last one takes it down.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from stack_project import StackProject

from svd import storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackProject]:
    project = StackProject(tmp_path_factory.mktemp("stack") / "clone")
    project.preset("micro", {})
    project.preset("broken", {"sources.paths": ["footage-that-is-not-there"]})
    project.preset("longer", {"sources.synthetic.train_videos": 8, "sources.synthetic.scenes_per_video": 10})
    try:
        project.up()
        yield project
    finally:
        project.run("svd", "stack", "down", check=False)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_literal_command_runs_stages_as_deployments(
    project: StackProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project.start_pipeline("micro", '["sources", "orbits"]', "store=s3://svd/results")
    done = project.wait(run)
    assert done["state_type"] == "COMPLETED", project.logs()
    children = project.children(run)
    assert [c["name"] for c in children] == ["sources-micro", "orbits-micro"]
    assert all(c["state_type"] == "COMPLETED" and c["deployment_id"] for c in children)
    assert {done["work_pool_name"], *(c["work_pool_name"] for c in children)} == {"cpu"}
    lock = (project.folder / "dvc.lock").read_text()
    assert "outputs/micro/sources" in lock and "outputs/micro/orbits" in lock

    env = dict(line.split("=", 1) for line in (project.folder / ".env").read_text().splitlines())
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert any(storage.list_files("s3://svd/dvc")), "the stages' flows pushed nothing to the DVC remote"
    stored = {e.relative for e in storage.list_files("s3://svd/results/micro/orbits")}
    assert stored == names(project.folder / "outputs/micro/orbits") | {"manifest.json"}
    client = mlflow.MlflowClient(env["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([client.get_experiment_by_name("stable-video-diffusion").experiment_id])
    assert sorted(r.data.tags["stage"] for r in runs) == ["full-pipeline", "orbits", "sources"]
    assert {r.info.status for r in runs} == {"FINISHED"}


def test_files_with_secrets_are_private_and_status_shows_addresses(project: StackProject) -> None:
    for name in (".env", ".local/s3/secret", ".local/s3/s3.json"):
        assert stat.S_IMODE((project.folder / name).stat().st_mode) == 0o600
    said = project.run("svd", "stack", "status")
    for name in ("prefect", "mlflow", "s3", "worker-cpu", "worker-gpu", f"http://127.0.0.1:{project.ports['mlflow']}"):
        assert name in said


def test_nightly_runs_are_scheduled(project: StackProject) -> None:
    wanted = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    runs = project.api.post("/flow_runs/filter", json=wanted).json()
    nightly = project.api.get("/deployments/name/nightly-evaluation/nightly-evaluation").json()
    times = [run["expected_start_time"] for run in runs if run["deployment_id"] == nightly["id"]]
    assert len(times) >= 2 and all("T02:00:00" in time for time in times)


def test_the_parent_fails_when_a_child_fails(project: StackProject) -> None:
    run = project.start_pipeline("broken", '["sources"]')
    done = project.wait(run)
    assert done["state_type"] == "FAILED" and "stage 'sources' ended Failed" in done["state"]["message"]
    (child,) = project.children(run)
    assert child["state_type"] == "FAILED" and "footage-that-is-not-there" in child["state"]["message"]


def test_the_server_is_killed_and_started_again_during_a_stage(project: StackProject) -> None:
    run = project.start_pipeline("longer", '["sources"]')
    project.wait_for_child(run)
    project.kill("prefect")
    assert "prefect" not in project.run("svd", "stack", "status").split("service")[0].replace("worker", "")
    project.up()
    assert project.wait(run)["state_type"] == "COMPLETED", project.logs()
    assert [c["state_type"] for c in project.children(run)] == ["COMPLETED"]


def test_a_machine_that_dies_in_a_stage_crashes_the_run_and_a_new_one_goes_on(project: StackProject) -> None:
    run = project.start_pipeline("longer", '["sources"]', "force=true")
    child = project.wait_for_child(run)
    work = project.folder / "work" / "longer" / "sources"
    while not any(work.rglob("*.mp4")):
        assert project.flow_run(child["id"])["state_type"] == "RUNNING"
    project.kill("worker-cpu")
    made = {path.stat().st_ino: path.name for path in work.rglob("*.mp4")}
    assert made
    project.up()
    assert project.wait(run, 240)["state_type"] == "CRASHED"
    assert project.wait(child["id"], 60)["state_type"] == "CRASHED"
    again = project.start_pipeline("longer", '["sources"]', "force=true")
    assert project.wait(again)["state_type"] == "COMPLETED", project.logs()
    kept = {path.stat().st_ino for path in (project.folder / "outputs/longer/sources").rglob("*.mp4")}
    assert made.keys() <= kept, "videos that were finished before the crash were made again"


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
