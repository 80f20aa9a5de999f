"""Several folders share one installation: each computes with its own presets, and its lock says what it computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from micro_project import Project, make_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which the stage `orbits` ran with two objects."""
    project = make_project(tmp_path_factory.mktemp("folders") / "first")
    project.run("dvc", "repro", "orbits")
    project.run("git", "add", ".")
    project.run("git", "commit", "-qm", "orbits")
    assert objects(project.root) == 2
    return project


def objects(folder: Path) -> int:
    return int(json.loads((folder / "outputs/micro/orbits/metrics.json").read_text())["objects"])


def test_an_experiment_in_a_temporary_folder_computes_with_its_own_value(project: Project, tmp_path: Path) -> None:
    tried = project.copy(tmp_path / "tried")
    change = "presets/micro.yaml:orbits.objects=3"
    said = tried.run("dvc", "exp", "run", "--temp", "-n", "three", "-S", change, "orbits")
    assert "Running stage 'orbits'" in said and objects(tried.root) == 2, "the working folder is left alone"
    refs = tried.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    (three,) = [ref for ref in refs if ref.endswith("/three")]
    (tried.root / "dvc.lock").write_text(tried.run("git", "show", f"{three}:dvc.lock"))
    tried.run("dvc", "checkout", "-f", "outputs/micro/orbits")
    recorded = tried.lock()["orbits"]["params"]["presets/micro.yaml"]["orbits"]
    assert objects(tried.root) == recorded["objects"] == 3


def test_a_second_worktree_computes_with_its_own_preset(project: Project, tmp_path: Path) -> None:
    second = tmp_path / "second"
    project.run("git", "worktree", "add", "-q", str(second), "HEAD")
    preset = second / "presets" / "micro.yaml"
    values = yaml.safe_load(preset.read_text())
    values["orbits"]["objects"] = 4
    preset.write_text(yaml.safe_dump(values, sort_keys=False))
    Project(second).run("svd", "stage", "orbits", "-p", "micro", PYTHONPATH=str(project.root))
    assert objects(second) == 4 and objects(project.root) == 2


def test_a_fresh_clone_runs_a_single_stage_without_an_inventory(project: Project, tmp_path: Path) -> None:
    clone = Project(tmp_path / "clone")
    project.run("git", "clone", "-q", str(project.root), str(clone.root))
    clone.run("dvc", "repro", "-s", "-f", "orbits")
    assert objects(clone.root) == 2
