"""The parent flow on an ephemeral Prefect server: inline dispatch, skipping, failing without retries, promotion."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from prefect.client.orchestration import get_client
from prefect.states import Failed
from prefect.testing.utilities import prefect_test_harness

from flows import stage_flow
from flows.full_pipeline import full_pipeline
from flows.stages import Stage
from flows.tracking import tracking_uri
from svd.retries import Unreachable
from svd.stage import Report, StageContext, UserError, publish

ROOT = Path(__file__).parents[2]
PIPELINE = """
vars: [params.yaml]
stages:
  orbits:
    cmd: svd stage orbits --preset ${preset}
    deps:
      - code.py
    params:
      - presets/${preset}.yaml:
          - orbits
    outs:
      - outputs/${preset}/orbits
"""


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=240):
        yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project whose only stage is `orbits`."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "SVD_DISPATCH", "SVD_STORE"):
        monkeypatch.delenv(name, raising=False)
    subprocess.run(["git", "init", "-q", "."], check=True)
    subprocess.run([Path(sys.executable).parent / "dvc", "init", "-q"], check=True)
    (tmp_path / "presets").mkdir()
    shutil.copy(ROOT / "presets" / "tiny.yaml", tmp_path / "presets")
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "params.yaml").write_text("preset: tiny\n")
    (tmp_path / "code.py").write_text("1\n")
    return tmp_path


Work = Callable[[StageContext], Report]


def use(monkeypatch: pytest.MonkeyPatch, work: Work) -> list[Path]:
    """Let `work` be what every stage computes; returns the list of its calls."""
    calls: list[Path] = []

    def run(context: StageContext) -> Report:
        calls.append(context.work)
        return work(context)

    monkeypatch.setattr(Stage, "load", lambda self: run)
    return calls


def draw(context: StageContext) -> Report:
    finished = context.work / "finished"
    finished.mkdir()
    (finished / "orbit.txt").write_text(f"{context.preset.orbits.objects} objects\n")
    return publish(finished, context.output, Report({"objects": 64}, "64 objects"))


def refuse(context: StageContext) -> Report:
    raise UserError("presets/tiny.yaml: there is no mesh.glb")


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
    assert not (project / "dvc.lock").exists()


@pytest.mark.parametrize(
    ("cause", "again"), [(UserError("wrong preset"), False), (Unreachable("no S3"), True), (RuntimeError("odd"), True)]
)
def test_what_is_tried_again(cause: Exception, again: bool) -> None:
    state = Failed(data=cause)
    assert stage_flow._worth_retrying(None, None, state) is again  # type: ignore[arg-type]
