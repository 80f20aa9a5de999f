"""The recipe of CONTRIBUTING for an evaluation stage, followed from outside: what it touches, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from micro_project import Project, make_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
GENERATED = {"dvc.yaml", "branches/dvc.yaml", "prefect.yaml"}
MODULE = '''"""Count the frames of the rendered orbits."""

from __future__ import annotations

from svd.stage import Report, StageContext, publish


def run(context: StageContext) -> Report:
    """Count the files of `orbits` that are as large as the preset asks for, and publish the number."""
    least = context.preset.evaluation.frame_count.least_bytes
    files = [path for path in context.inputs["orbits"].rglob("*") if path.is_file() and path.stat().st_size >= least]
    finished = context.work / "finished"
    finished.mkdir(exist_ok=True)
    return publish(finished, context.output, Report({"files": len(files)}, f"{len(files)} files"))
'''
ROW = """    Stage(
        "frame-count",
        "Count the files of the orbits.",
        "evaluation.frame_count:run",
        hours=1,
        inputs=("orbits",),
        options=("evaluation.frame_count",),
        pool="cpu",
    ),
"""
SECTION = '''class FrameCountConfig(Section):
    """Count of the frames of the orbits."""

    least_bytes: PositiveInt = Field(1, description="smaller files don't count")


class EvaluationConfig(Section):'''


def insert(path: Path, before: str, text: str) -> None:
    content = path.read_text()
    assert content.count(before) == 1
    path.write_text(content.replace(before, text + before))


def touched(project: Project) -> set[str]:
    said = project.run("git", "status", "--porcelain", "--untracked-files=all")
    return {line.split()[-1] for line in said.splitlines()} - GENERATED


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which the recipe was followed."""
    project = make_project(tmp_path_factory.mktemp("stage") / "project")
    (project.root / "evaluation" / "frame_count.py").write_text(MODULE)
    insert(project.root / "flows" / "stages.py", '    Stage(\n        "report",', ROW)
    config = project.root / "svd" / "config" / "evaluation.py"
    config.write_text(config.read_text().replace("class EvaluationConfig(Section):", SECTION))
    config.write_text(config.read_text() + "    frame_count: FrameCountConfig = FrameCountConfig()\n")
    preset = project.root / "presets" / "micro.yaml"
    values = yaml.safe_load(preset.read_text())
    values["evaluation"]["frame_count"] = {"least_bytes": 2}
    preset.write_text(yaml.safe_dump(values, sort_keys=False))
    return project


def test_the_recipe_touches_four_files(project: Project) -> None:
    assert touched(project) == {
        "evaluation/frame_count.py",
        "flows/stages.py",
        "presets/micro.yaml",
        "svd/config/evaluation.py",
    }


def test_the_stage_is_rendered_listed_and_runs(project: Project) -> None:
    assert "run `svd platform render`" in project.run("svd", "platform", "render", "--check", code=1)
    assert "dvc.yaml, prefect.yaml" in project.run("svd", "platform", "render")
    assert "frame-count" in project.run("svd", "stages")
    orbits = project.outputs / "orbits"
    orbits.mkdir(parents=True)
    (orbits / "a").write_text("more than one byte")
    (orbits / "b").write_text("1")
    assert "1 files" in project.run("svd", "stage", "frame-count", "-p", "micro")
    assert json.loads((project.outputs / "frame-count" / "metrics.json").read_text()) == {"files": 1}
    entry = yaml.safe_load((project.root / "dvc.yaml").read_text())["stages"]["frame-count"]
    assert entry["deps"] == [f"outputs/${{preset}}/{name}" for name in ("orbits", "inventory/frame-count.json")]
    deployments = yaml.safe_load((project.root / "prefect.yaml").read_text())["deployments"]
    assert "flows/prefect_flows/stage_flows.py:frame_count" in [one["entrypoint"] for one in deployments]
