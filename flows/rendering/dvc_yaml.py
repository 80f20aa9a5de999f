"""`dvc.yaml` and `branches/dvc.yaml`, made from the table of stages.

No source file is listed: a stage depends on `outputs/PRESET/inventory/STAGE.json`, where `svd inventory` writes a
digest of the stage's code (flows/recording/code.py), of the versions of the packages it runs with, and the files
outside the project. So a comment runs nothing again, and a changed constant runs what it can change.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flows.places import Place
from flows.rendering.yaml_text import file_text
from flows.stages import STAGES, Stage

MAIN, BRANCH = Path("dvc.yaml"), Path("branches") / "dvc.yaml"
_PRESET = "${preset}"
_MAIN_HEAD = """\
The stages as DVC sees them: what each reads, which options matter to it, what it writes.
`dvc repro` runs them on this machine; the Prefect flows run the same functions and keep the same dvc.lock.
`inventory` runs every time; the other stages run when an input, an option or their line of the inventory changed.
"""
_BRANCH_HEAD = """\
The stages beside the main chain, run with `dvc repro branches/dvc.yaml`; paths are those of the project's folder.
A stage with `persist` keeps its output between two runs, because people add to it (votes).
"""


def dvc_file(stage: Stage) -> Path:
    """Return the file that describes `stage` to DVC, relative to the project's folder."""
    return BRANCH if stage.branch else MAIN


def render_main() -> str:
    """Return the text of dvc.yaml: the inventory, the stages of `full-pipeline`, metrics and plots."""
    stages = [stage for stage in STAGES.values() if not stage.branch]
    content = {
        "vars": ["params.yaml"],
        "stages": {"inventory": _inventory()} | {stage.name: _entry(stage) for stage in stages},
        "metrics": [f"{_output(stage)}/metrics.json" for stage in stages],
        "plots": [_plot("training loss", "train_loss", stages), _plot("validation loss", "val_loss", stages)],
    }
    return file_text(_MAIN_HEAD, content)


def render_branches() -> str:
    """Return the text of branches/dvc.yaml, whose paths start at the project's folder."""
    stages = [stage for stage in STAGES.values() if stage.branch]
    content = {
        "vars": ["../params.yaml"],
        "stages": {stage.name: _entry(stage) for stage in stages},
        "metrics": [f"../{_output(stage)}/metrics.json" for stage in stages],
    }
    return file_text(_BRANCH_HEAD, content)


def _output(stage: Stage) -> str:
    return Place(_PRESET, stage.name).output.as_posix()


def _inventory_file(stage: Stage) -> str:
    return Place(_PRESET, stage.name).inventory.as_posix()


def _inventory() -> dict[str, Any]:
    """The entry that lists, for every stage, its code and the files outside the project that the preset names."""
    return {
        "desc": "What the stages are made of besides options and inputs: their code, packages, files outside.",
        "cmd": f"svd inventory --preset {_PRESET}",
        "always_changed": True,
        "outs": [{_inventory_file(stage): {"cache": False}} for stage in STAGES.values()],
    }


def _entry(stage: Stage) -> dict[str, Any]:
    inputs = [folder.as_posix() for folder in Place(_PRESET, stage.name).inputs.values()]
    return {
        "desc": stage.description,
        "cmd": f"svd stage {stage.name} --preset {_PRESET}",
        **({"wdir": ".."} if stage.branch else {}),
        "deps": [*inputs, _inventory_file(stage)],
        "params": [{f"presets/{_PRESET}.yaml": list(stage.options)}],
        "outs": [{_output(stage): {"persist": True}} if stage.keep else _output(stage)],
    }


def _plot(title: str, column: str, stages: Iterable[Stage]) -> dict[str, Any]:
    """A curve per stage that writes losses.csv."""
    curves = {f"{_output(stage)}/losses.csv": column for stage in stages if stage.losses}
    labels = {"title": f"{title.capitalize()} by stage", "x_label": "step", "y_label": "loss"}
    return {title: {"x": "step", "y": curves, **labels}}
