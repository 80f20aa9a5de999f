"""The parent flow on an ephemeral Prefect server: inline dispatch, skipping, failing without retries, promotion."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.states import Failed
from prefect.testing.utilities import prefect_test_harness
from small_project import draw, make_project, refuse, use

from flows.prefect_flows import stage_flows as stage_flow
from flows.prefect_flows.full_pipeline import full_pipeline
from flows.recording.dvc import lineage
from flows.recording.results_store import stored_output
from flows.tracking.runs import tracking_uri
from svd.config.load import load_preset
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
    assert (project / "outputs/tiny/orbits/orbit.txt").read_text() == f"{load_preset('tiny').orbits.objects} objects\n"
    assert "outputs/tiny/orbits" in (project / "dvc.lock").read_text()
    assert full_pipeline(preset="tiny", stages=["orbits"])["ran"] == []
    (project / "code.py").write_text("2\n")
    assert full_pipeline(preset="tiny", stages=["orbits"], store=str(project / "store"))["ran"] == ["orbits"]
    assert len(calls) == 2
    assert stored_output(str(project / "store"), "tiny", "orbits") in lineage("orbits", "tiny")[1]
    assert not list((project / "store/work").rglob("manifest.json"))
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
    parents = [runs[run.data.tags["mlflow.parentRunId"]] for run in stages]
    assert all(
        p.data.metrics["cost/cpu_hours"] == s.data.metrics["cost/cpu_hours"] > 0
        for p, s in zip(parents, stages, strict=True)
    )
    kept = client.download_artifacts(parents[0].info.run_id, "dvc/dvc.lock", str(project))
    assert Path(kept).read_text() == (project / "dvc.lock").read_text()


def test_a_users_mistake_fails_the_pipeline_without_retries(
    prefect_server: None, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = use(monkeypatch, refuse)
    state: Any = full_pipeline(preset="tiny", stages=["orbits"], return_state=True)
    assert state.is_failed() and len(calls) == 1
    assert isinstance(state.result(raise_on_failure=False), UserError)
    assert "mesh.glb" in state.message
    assert "outputs/tiny/orbits" not in (project / "dvc.lock").read_text()


def test_more_nodes_than_a_flow_has_are_refused_before_the_first_stage(
    prefect_server: None, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = use(monkeypatch, draw)
    preset = yaml.safe_load((project / "presets/tiny.yaml").read_text())
    preset.setdefault("compute", {})["image_to_video"] = {"nodes": 2}
    (project / "presets/tiny.yaml").write_text(yaml.safe_dump(preset))
    with pytest.raises(UserError, match="stage 'image-to-video' wants 2 nodes"):
        full_pipeline(preset="tiny", stages=["orbits", "image-to-video"])
    assert not calls


@pytest.mark.parametrize(
    ("cause", "again"), [(UserError("wrong preset"), False), (Unreachable("no S3"), True), (RuntimeError("odd"), True)]
)
def test_what_is_tried_again(cause: Exception, again: bool) -> None:
    state = Failed(data=cause)
    assert stage_flow._worth_retrying(None, None, state) is again  # type: ignore[arg-type]
