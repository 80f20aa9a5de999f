"""The recipes of CONTRIBUTING for stages, followed from outside: what they touch, and that the stage is known."""

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


TRAINING = '''@on_all_ranks("looping")
def run_looping(context: StageContext) -> Report:
    """Train clips whose last frame leads back to the first.

    Inputs: latents, encoders, autoencoder, image-to-video.
    """
    return run_training(_training(context, "looping", IMAGE_TO_VIDEO, context.preset.looping, "image-to-video"))


'''
TRAINING_ROW = """    Stage(
        "looping",
        "Finetune image-to-video to clips that loop.",
        "svd.training.stages:run_looping",
        hours=72,
        inputs=("latents", *_NETWORKS, "image-to-video"),
        options=_training("looping"),
        model="svd-looping",
        distributed=True,
        losses=True,
        branch=True,
    ),
"""
KNOWN = """
from flows.prefect_flows.dispatch import stage_flow
from flows.project import pipeline_preset
from flows.serving.signature import signature
from svd.tasks.registry import task_of_stage

for name in ("micro", "tiny", "finetune", "paper"):
    preset = pipeline_preset(name)
    print(name, preset.compute.of("looping").devices, signature(preset, "looping").inputs.input_names())
print(task_of_stage("looping").name, stage_flow("looping").name)
"""


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
    for path in (project.root / "presets").glob("*.yaml"):
        text = path.read_text()
        assert text.count("\nevaluation:\n") == 1
        path.write_text(text.replace("\nevaluation:\n", "\nevaluation:\n  frame_count: {least_bytes: 2}\n"))
    return project


def test_the_recipe_touches_three_files_and_each_preset(project: Project) -> None:
    presets = {f"presets/{path.name}" for path in (project.root / "presets").glob("*.yaml")}
    assert len(presets) == 4
    assert touched(project) == presets | {"evaluation/frame_count.py", "flows/stages.py", "svd/config/evaluation.py"}


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


def test_dvc_runs_the_stage_for_another_preset(project: Project) -> None:
    project.run("svd", "platform", "render")
    orbits = project.root / "outputs" / "tiny" / "orbits"
    orbits.mkdir(parents=True)
    (orbits / "a").write_text("more than one byte")
    (project.root / "params.yaml").write_text("preset: tiny\n")
    project.run("svd", "inventory", "--preset", "tiny")
    project.run("dvc", "repro", "--single-item", "frame-count")
    assert project.lock()["frame-count"]["params"] == {
        "presets/tiny.yaml": {"evaluation.frame_count": {"least_bytes": 2}}
    }
    preset = project.root / "presets" / "finetune.yaml"
    preset.write_text(preset.read_text().replace("  frame_count: {least_bytes: 2}\n", ""))
    said = project.run("svd", "pipeline", "-p", "finetune", code=1)
    assert "presets/finetune.yaml leaves 'evaluation.frame_count' to the default" in " ".join(said.split())


def test_the_recipe_of_a_training_stage(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    code = project.root / "svd"
    insert(code / "training" / "stages.py", '@on_all_ranks("multiview_finetuning")', TRAINING)
    insert(code / "tasks" / "image_to_video.py", '"camera-lora"),\n    ids', '"looping", ')
    insert(code / "config" / "preset.py", "    orbits: OrbitsConfig", "    looping: TrainingConfig\n")
    insert(code / "config" / "preset.py", '"camera_lora", "frame_interpolation"):', '"looping", ')
    insert(code / "config" / "compute.py", '    "threshold_calibration",\n', '    "looping",\n')
    training = "    looping: TrainingCompute = TrainingCompute()\n"
    insert(code / "config" / "compute.py", "    threshold_calibration: TrainingCompute", training)
    insert(project.root / "flows" / "stages.py", '    Stage(\n        "threshold-calibration"', TRAINING_ROW)
    presets = set()
    for path in (project.root / "presets").glob("*.yaml"):
        section = {"looping": yaml.safe_load(path.read_text())["image_to_video"]}
        path.write_text(f"{path.read_text()}\n{yaml.safe_dump(section)}")
        presets.add(f"presets/{path.name}")
    assert touched(project) == presets | {
        "svd/training/stages.py",
        "svd/tasks/image_to_video.py",
        "svd/config/preset.py",
        "svd/config/compute.py",
        "flows/stages.py",
    }
    assert "branches/dvc.yaml" in project.run("svd", "platform", "render")
    assert "looping" in project.run("svd", "stages", "--reaching", "svd/training/stages.py")
    known = project.run("python", "-c", KNOWN).splitlines()
    assert known[-5:-1] == ["micro 1 ['image']", "tiny 1 ['image']", "finetune 1 ['image']", "paper 8 ['image']"]
    assert known[-1] == "image-to-video looping"
    said = project.run("svd", "stage", "looping", "-p", "micro", code=1)
    assert "run `svd stage latents --preset micro`" in " ".join(said.split())
