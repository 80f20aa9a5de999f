"""`dvc repro` on the whole pipeline, and DVC's everyday commands on what it made."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from micro_project import TRAINED, Project, make_project, shared, undisturbed

from flows.stages import PIPELINE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
FOLLOWING = ["high-quality-finetuning", "ucf101-evaluation", "recognition-evaluation", "report"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which `dvc repro` ran from the beginning to the end, and was committed."""

    def reproduce(folder: Path) -> None:
        project = make_project(folder)
        assert ran(project.run("dvc", "repro")) == list(PIPELINE)
        commit(project, "dvc.lock")

    return Project(shared(tmp_path_factory, "reproduced", reproduce))


def ran(said: str) -> list[str]:
    """The stages that `dvc repro` ran, in the order of the pipeline."""
    found = re.findall(r"^Running stage '([\w-]+)':", said, re.MULTILINE)
    assert len(found) == len(set(found))
    return [name for name in PIPELINE if name in found]


def commit(project: Project, *files: str) -> None:
    project.run("git", "add", *files)
    project.run("git", "commit", "-qm", "more")


def set_parameter(project: Project, section: str, key: str, value: object) -> None:
    path = project.root / "presets" / "micro.yaml"
    values = yaml.safe_load(path.read_text())
    values[section][key] = value
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def test_the_flows_and_repro_write_the_same_lock(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert project.lock() == undisturbed(tmp_path_factory).lock()


def test_nothing_runs_again_in_dvc_nor_in_the_flows(project: Project) -> None:
    assert ran(project.run("dvc", "repro")) == []
    before = (project.root / "dvc.lock").read_text()
    said = project.run("svd", "pipeline")
    assert re.findall(r"stage ([\w-]+) is unchanged", said) == list(PIPELINE)
    assert "report: outputs/micro/report/report.html" in said
    assert (project.root / "dvc.lock").read_text() == before
    assert not list(project.work.glob("*/*/published")), "work that is recorded was left behind"


def test_metrics_and_plots_show_every_stage(project: Project) -> None:
    said = project.run("dvc", "metrics", "show", "--json")
    shown = json.loads(said[said.index("{") : said.rindex("}") + 1])[""]["data"]
    metrics = {path: entry["data"] for path, entry in shown.items() if "data" in entry}  # branches have not run
    assert set(metrics) == {f"outputs/micro/{name}/metrics.json" for name in PIPELINE}
    assert metrics["outputs/micro/video-pretraining/metrics.json"]["steps"] == 6
    project.run("dvc", "plots", "show", "--out", "plots")
    page = (project.root / "plots" / "index.html").read_text()
    for stage in TRAINED:
        name = stage.replace("_", "-")
        rows = (project.outputs / name / "losses.csv").read_text().split()[1:]
        assert len(rows) == 7
        step, train, validation = rows[-1].split(",")
        assert name in page and f'"train_loss": "{train}"' in page and f'"val_loss": "{validation}"' in page, name
        assert f'"step": "{step}"' in page


def test_an_empty_clone_pulls_what_was_pushed(project: Project, tmp_path: Path) -> None:
    project.run("dvc", "remote", "add", "--local", "-d", "-f", "store", str(tmp_path / "store"))
    project.run("dvc", "push")
    clone = Project(tmp_path / "clone")
    project.run("git", "clone", "-q", str(project.root), str(clone.root))
    assert not (clone.root / "outputs").exists() and not (clone.root / ".dvc" / "cache").exists()
    clone.run("dvc", "remote", "add", "--local", "-d", "store", str(tmp_path / "store"))
    clone.run("dvc", "pull", "dvc.yaml")
    files = sorted(path.relative_to(project.root) for path in project.outputs.glob("[!.]*/**/*") if path.is_file())
    files = [path for path in files if path.parts[2] != "inventory"]
    assert {path.parts[2] for path in files} >= set(PIPELINE)
    assert all((clone.root / path).read_bytes() == (project.root / path).read_bytes() for path in files)
    assert ran(clone.run("dvc", "repro")) == []


def test_a_parameter_of_the_last_training_stage_reruns_it_and_what_follows(project: Project, tmp_path: Path) -> None:
    changed = project.copy(tmp_path / "changed")
    set_parameter(changed, "high_quality_finetuning", "matrix_rate", 0.02)
    assert ran(changed.run("dvc", "repro")) == FOLLOWING
    before, after = project.lock(), changed.lock()
    assert {name for name in PIPELINE if before[name]["outs"] != after[name]["outs"]} == set(FOLLOWING)
    assert ran(changed.run("dvc", "repro")) == []


def test_an_experiment_runs_only_what_its_parameter_touches(project: Project, tmp_path: Path) -> None:
    tried = project.copy(tmp_path / "tried")
    parameter = "presets/micro.yaml:evaluation.ucf101.samples=4"
    said = tried.run("dvc", "exp", "run", "-n", "four", "-S", parameter)
    assert ran(said) == ["ucf101-evaluation", "report"]
    table = tried.run("dvc", "exp", "show", "--csv")
    assert "four" in table
    metrics = json.loads((tried.outputs / "ucf101-evaluation" / "metrics.json").read_text())
    assert metrics["generated_clips"] == 4
