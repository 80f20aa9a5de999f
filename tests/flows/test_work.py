"""What is left of a stage between its end and the recording of its output in dvc.lock."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import yaml

from flows.recording import dvc as versioning
from flows.recording import work
from flows.running import runner
from flows.stages import Stage
from flows.tracking.runs import tracking_uri
from svd.config.load import load_preset
from svd.stage import Report, StageContext, publish

ROOT = Path(__file__).parents[2]
TINY = load_preset("tiny")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the stage `orbits` alone."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "SVD_STORE", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    subprocess.run(["git", "init", "-q", "."], check=True)
    subprocess.run([Path(sys.executable).parent / "dvc", "init", "-q"], check=True)
    (tmp_path / "presets").mkdir()
    shutil.copy(ROOT / "presets" / "tiny.yaml", tmp_path / "presets")
    entry = {"cmd": "svd stage orbits --preset ${preset}", "outs": ["outputs/${preset}/orbits"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"vars": ["params.yaml"], "stages": {"orbits": entry}}))
    (tmp_path / "params.yaml").write_text("preset: tiny\n")
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The stage computes something else each time; the list holds what it computed."""
    made: list[float] = []

    def run(context: StageContext) -> Report:
        made.append(float(len(made)))
        context.tracker.log_metrics({"drawn": made[-1]}, 1)
        (context.work / "finished").mkdir()
        (context.work / "finished" / "orbit.txt").write_text(f"{made[-1]}\n")
        return publish(context.work / "finished", context.output, Report({"count": made[-1]}, f"number {made[-1]}"))

    monkeypatch.setattr(Stage, "load", lambda self: run)
    return made


def published(project: Path) -> str:
    return (project / "outputs/tiny/orbits/orbit.txt").read_text()


def repro(monkeypatch: pytest.MonkeyPatch) -> Report:
    """What `dvc repro` does to run the stage: the output goes first."""
    shutil.rmtree("outputs", ignore_errors=True)
    with monkeypatch.context() as inside:
        inside.setenv("DVC_STAGE", "orbits")
        return runner.run_preset_stage("orbits", TINY)


def test_by_hand_every_run_computes_and_leaves_nothing(project: Path, calls: list[float]) -> None:
    for number in range(2):
        assert runner.run_preset_stage("orbits", TINY).metrics == {"count": float(number)}
    assert calls == [0.0, 1.0] and published(project) == "1.0\n"
    assert not (project / "work/tiny/orbits").exists()


def test_a_kill_before_the_output_is_recorded_costs_nothing(
    project: Path, calls: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = repro(monkeypatch)
    assert repro(monkeypatch) == first == Report({"count": 0.0}, "number 0.0")
    assert calls == [0.0] and published(project) == "0.0\n"
    client = mlflow.MlflowClient(tracking_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("stable-video-diffusion").experiment_id])
    assert [point.value for point in client.get_metric_history(run.info.run_id, "drawn")] == [0.0]


def test_a_recorded_output_is_made_anew_when_asked_for_again(
    project: Path, calls: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    repro(monkeypatch)
    versioning.record("orbits", "tiny", versioning.save_outputs("orbits", "tiny"), {})
    repro(monkeypatch)
    assert calls == [0.0, 1.0] and published(project) == "1.0\n"
    client = mlflow.MlflowClient(tracking_uri())
    runs = client.search_runs([client.get_experiment_by_name("stable-video-diffusion").experiment_id])
    assert len(runs) == 2, "the second run is a run of its own"


def test_other_code_does_not_take_the_output(
    project: Path, calls: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    repro(monkeypatch)
    monkeypatch.setattr(work, "code_digest", lambda stage: "edited")
    repro(monkeypatch)
    assert calls == [0.0, 1.0]


def test_a_kill_inside_publishing_costs_nothing(
    project: Path, calls: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Callable[[Path, Path], Path] = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "finished":
            raise KeyboardInterrupt
        return plain(path, target)

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(Path, "rename", rename)
        repro(monkeypatch)
    assert not (project / "outputs/tiny/orbits").exists()
    assert repro(monkeypatch).summary == "number 0.0"
    assert calls == [0.0] and published(project) == "0.0\n"


def test_the_next_stage_clears_what_dvc_has_recorded(
    project: Path, calls: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    repro(monkeypatch)
    work.clear_recorded(TINY)
    assert (project / "work/tiny/orbits").exists()
    versioning.record("orbits", "tiny", versioning.save_outputs("orbits", "tiny"), {})
    work.clear_recorded(TINY)
    assert not (project / "work/tiny/orbits").exists()


def test_a_new_version_of_a_package_does_not_take_the_output(
    project: Path, calls: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    repro(monkeypatch)
    monkeypatch.setattr(work, "packages_digest", lambda: "updated")
    repro(monkeypatch)
    assert calls == [0.0, 1.0]
