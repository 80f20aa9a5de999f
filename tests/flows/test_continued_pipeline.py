"""A pipeline that was interrupted: what it goes on with, under which MLflow run, and what its log says of mistakes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

from flows import versioning
from flows.full_pipeline import full_pipeline, pipeline_key
from flows.stages import Stage
from svd.presets import load_preset
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


def die(*given: object) -> None:
    raise KeyboardInterrupt


def test_what_was_not_recorded_is_not_computed_again(
    prefect_server: None, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = use(monkeypatch, draw)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(versioning, "record", die)
        with pytest.raises(KeyboardInterrupt):
            full_pipeline(preset="tiny", stages=["orbits"])
    assert not (project / "dvc.lock").exists()
    shutil.rmtree(project / "outputs")  # what `dvc repro` does before it runs the stage again
    assert full_pipeline(preset="tiny", stages=["orbits"])["ran"] == ["orbits"]
    assert len(calls) == 1
    assert (project / "outputs/tiny/orbits/orbit.txt").read_text() == "64 objects\n"
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
    with pipeline_key(preset, ["orbits"], False) as third:
        assert third == second
