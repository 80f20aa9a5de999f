"""The parent flow on an ephemeral Prefect server: inline dispatch, skipping, failing without retries, promotion."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL
from prefect.states import Failed
from prefect.testing.utilities import prefect_test_harness
from small_project import draw, make_project, refuse, use

from flows.prefect_flows import stage_flows as stage_flow
from flows.prefect_flows.full_pipeline import full_pipeline
from flows.stack import server_setup
from flows.tracking.runs import tracking_uri
from svd.core.errors import UserError
from svd.core.retries import Unreachable


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=240):
        yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_project(tmp_path, monkeypatch)


def child_states() -> list[tuple[str, str]]:
    with get_client(sync_client=True) as client:
        return [(run.name, run.state_name or "") for run in client.read_flow_runs()]


def test_stages_run_once_and_are_skipped_while_nothing_changes(
    prefect_server: None, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = use(monkeypatch, draw)
    first = full_pipeline(preset="tiny", stages=["orbits"])
    assert first["ran"] == ["orbits"] and first["metrics"]["orbits"]["objects"] == 64
    assert (project / "outputs/tiny/orbits/orbit.txt").read_text() == "64 objects\n"
    assert "outputs/tiny/orbits" in (project / "dvc.lock").read_text()
    assert full_pipeline(preset="tiny", stages=["orbits"])["ran"] == []
    (project / "code.py").write_text("2\n")
    assert full_pipeline(preset="tiny", stages=["orbits"], store=str(project / "store"))["ran"] == ["orbits"]
    assert len(calls) == 2
    assert (project / "store/tiny/orbits/manifest.json").is_file()
    for lost in ("outputs", ".dvc/cache"):  # the stage ran on another machine: its result lies in the store alone
        shutil.rmtree(project / lost)
    assert full_pipeline(preset="tiny", stages=["orbits"], store=str(project / "store"))["ran"] == []
    assert ("orbits-tiny", "Completed") in child_states()
    client = mlflow.MlflowClient(tracking_uri())
    experiment = client.get_experiment_by_name("stable-video-diffusion").experiment_id
    runs = {run.info.run_id: run for run in client.search_runs([experiment])}
    stages = [run for run in runs.values() if run.data.tags["stage"] == "orbits"]
    assert len(stages) == 2
    assert all(runs[run.data.tags["mlflow.parentRunId"]].data.tags["stage"] == "full-pipeline" for run in stages)


def test_a_users_mistake_fails_the_pipeline_without_retries(
    prefect_server: None, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = use(monkeypatch, refuse)
    state: Any = full_pipeline(preset="tiny", stages=["orbits"], return_state=True)
    assert state.is_failed() and len(calls) == 1
    assert isinstance(state.result(raise_on_failure=False), UserError)
    assert "mesh.glb" in state.message
    assert "outputs/tiny/orbits" not in (project / "dvc.lock").read_text()


def test_a_server_is_set_up_as_often_as_one_likes(prefect_server: None) -> None:
    api = str(PREFECT_API_URL.value())
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="cpu", type="process"))
        for made in (["crash-silent-runs"], []):
            server_setup.limit_pipelines(api)
            assert server_setup.install_automations(api) == made
            assert client.read_work_queue_by_name("pipelines", "cpu").concurrency_limit == 1


@pytest.mark.parametrize(
    ("cause", "again"), [(UserError("wrong preset"), False), (Unreachable("no S3"), True), (RuntimeError("odd"), True)]
)
def test_what_is_tried_again(cause: Exception, again: bool) -> None:
    state = Failed(data=cause)
    assert stage_flow._worth_retrying(None, None, state) is again  # type: ignore[arg-type]
