"""A project whose only stage is `orbits`, and what that stage computes in tests of the flows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.stages import Stage
from svd.core.errors import UserError
from svd.stage import Report, StageContext, publish

ROOT = Path(__file__).parents[2]
PIPELINE = """
vars: [params.yaml]
stages:
  inventory:
    cmd: svd inventory --preset ${preset}
    always_changed: true
    outs:
      - outputs/${preset}/inventory/orbits.json:
          cache: false
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
Work = Callable[[StageContext], Report]


def make_project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `folder` the project, and the working folder."""
    monkeypatch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "SVD_DISPATCH", "SVD_STORE"):
        monkeypatch.delenv(name, raising=False)
    subprocess.run(["git", "init", "-q", "."], check=True)
    subprocess.run([Path(sys.executable).parent / "dvc", "init", "-q"], check=True)
    (folder / "presets").mkdir()
    shutil.copy(ROOT / "presets" / "tiny.yaml", folder / "presets")
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text("preset: tiny\n")
    (folder / "code.py").write_text("1\n")
    return folder


def use(monkeypatch: pytest.MonkeyPatch, work: Work) -> list[Path]:
    """Let `work` be what every stage computes; returns the list of its calls."""
    calls: list[Path] = []

    def run(context: StageContext) -> Report:
        calls.append(context.work)
        return work(context)

    monkeypatch.setattr(Stage, "load", lambda self: run)
    return calls


def draw(context: StageContext) -> Report:
    """A stage that works."""
    finished = context.work / "finished"
    finished.mkdir()
    (finished / "orbit.txt").write_text(f"{context.preset.orbits.objects} objects\n")
    return publish(finished, context.output, Report({"objects": 64}, "64 objects"))


def refuse(context: StageContext) -> Report:
    """A stage that meets a user's mistake."""
    raise UserError("presets/tiny.yaml: there is no mesh.glb")
