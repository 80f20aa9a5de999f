"""SIGKILL to everything in the middle of curation, training, publishing and recording: the same command goes on."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from micro_project import Project, undisturbed

pytestmark = pytest.mark.slow
KILLED = ("curation", "video-pretraining", "ucf101-evaluation")
COMMANDS = {"flows": ("svd", "pipeline"), "dvc": ("dvc", "repro")}
SKIPPED = {"flows": "stage {} is unchanged", "dvc": "Stage '{}' didn't change, skipping"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return undisturbed(tmp_path_factory)


def units(project: Project) -> dict[str, int]:
    """The finished units of the curation in progress, by path, with their inodes."""
    found = project.work.glob("curation/*/scored/[!.]*")
    return {str(path): path.stat().st_ino for path in found}


def any_file(project: Project, pattern: str) -> bool:
    return any(True for _ in project.work.glob(pattern))


def weights(project: Project) -> dict[str, bytes]:
    files = sorted(project.outputs.rglob("*.safetensors"))
    return {str(path.relative_to(project.outputs)): path.read_bytes() for path in files}


def first_step(said: str, label: str) -> int:
    """The step at which the progress bar of a training began."""
    return int(re.search(rf"{label}: .*?(\d+)/\d+", said)[1])  # type: ignore[index]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", COMMANDS)
def test_a_killed_pipeline_goes_on_where_it_was(whole: Project, how: str, tmp_path: Path) -> None:
    project, command, skipped = whole.copy(tmp_path / "project"), COMMANDS[how], SKIPPED[how]
    project.forget(*KILLED)

    first = project.start(*command)
    first.kill_when(lambda: len(units(project)) >= 2)
    done = units(project)
    assert not (project.outputs / "curation").exists()

    second = project.start(*command)
    second.until(lambda: len(units(project)) > len(done))
    assert units(project).items() >= done.items(), "a finished unit was made again"
    second.kill_when(lambda: any_file(project, "video-pretraining/*/phase-0/step=3.ckpt"))
    assert project.lock()["curation"] == whole.lock()["curation"]

    third = project.start(*command, DIE_PUBLISHING="outputs/micro/ucf101-evaluation")
    said = third.finish(code=-9)
    assert skipped.format("curation") in said
    assert first_step(said, "video-pretraining") >= 3
    assert project.lock()["video-pretraining"] == whole.lock()["video-pretraining"]
    assert not (project.outputs / "ucf101-evaluation").exists()

    fourth = project.start(*command)
    fourth.kill_when(lambda: any_file(project, "ucf101-evaluation/*/delivered.json"))
    said = fourth.log.read_text()
    assert skipped.format("video-pretraining") in said and "generated-0" not in said, "sampled again"
    assert "ucf101-evaluation" not in project.lock()

    said = project.run(*command)
    assert "generated-0" not in said, "sampled again"
    assert project.lock() == whole.lock()
    assert weights(project) == weights(whole)
    check_mlflow(project, how)


def check_mlflow(project: Project, how: str) -> None:
    """One finished run a stage, all under one pipeline run, and no step of a metric twice."""
    runs, client = project.runs(), project.client()
    expected = Counter([*KILLED, *(["full-pipeline"] if how == "flows" else [])])
    assert Counter(run.data.tags["stage"] for run in runs) == expected
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs if run.data.tags["stage"] in KILLED}
    pipelines = {run.info.run_id for run in runs if run.data.tags["stage"] == "full-pipeline"}
    assert parents == (pipelines or {None})
    for run in runs:
        for metric in run.data.metrics:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
            assert len(steps) == len(set(steps)), (run.info.run_name, metric, steps)
    trained = next(run for run in runs if run.data.tags["stage"] == "video-pretraining")
    assert [m.step for m in client.get_metric_history(trained.info.run_id, "train_loss")] == [1, 2, 3, 4, 5, 6]
