"""The contract of a stage: a function that reads folders, writes its own and can be killed and run again at any time.

Work in progress lives in an untracked `work` folder, because DVC deletes a stage's outputs before it runs the command
again. `publish` makes the finished result the output folder. A stage looks like this:

    def run(context: StageContext) -> Report:
        finished = context.work / "finished"
        ...  # write into it; keep what a killed run has finished
        return publish(finished, context.output, Report({"clips": 12}, "12 clips"))
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from svd.config import Preset
from svd.core.files import replace_folder, write_json

KEPT = "published"
# A file of an input that lies here in part: where its other files are, by their relative paths.
STREAMED = "streamed.json"


class Tracker(Protocol):
    """The receiver of what a stage reports while it runs: MLflow in `flows/tracking/runs.py`, by default nobody."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log scalars at a step."""

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """Log an (H, W, 3) uint8 RGB image at a step."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep a file with the run, in its `folder`."""


class NoTracker:
    """A tracker that drops everything."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """Do nothing."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Profile:
    """The wish for a trace of so many steps of each phase that is trained, written into a folder."""

    steps: int
    folder: Path


@dataclass(frozen=True)
class StageContext:
    """The preset, folders and tracker of one run of a stage.

    inputs: folder of each input by the name of the stage that made it; output: the folder this stage publishes;
    work: the untracked folder for work in progress, kept when the stage is killed. description: one line for people,
    with the paper's section. options: those that the result depends on, by dotted path, as the preset's file has them.
    profile: which steps to trace, for trainings alone.
    """

    preset: Preset
    inputs: Mapping[str, Path]
    output: Path
    work: Path
    tracker: Tracker = field(default_factory=NoTracker)
    description: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    profile: Profile | None = None


@dataclass(frozen=True)
class Report:
    """The findings of a stage: `metrics` are written to `metrics.json`; `summary` is one line for people."""

    metrics: Mapping[str, float | int | str]
    summary: str


def publish(finished: Path, output: Path, report: Report) -> Report:
    """Write `metrics.json` into `finished`, then make it `output`; a kill leaves the old or the new folder.

    The two may lie on different file systems. Until the work folder is removed, hard links beside `finished` keep what
    was published: see `republish`.
    """
    write_json(finished / "metrics.json", dict(report.metrics))
    kept = finished.with_name(KEPT)
    discard_published(finished.parent)
    try:
        shutil.copytree(finished, kept, copy_function=os.link)
        write_json(kept.with_suffix(".json"), {"metrics": dict(report.metrics), "summary": report.summary})
    except OSError:  # a file system without hard links: the stage is done again when the recording is killed
        discard_published(finished.parent)
    replace_folder(finished, output)
    return report


def republish(work: Path, output: Path) -> Report | None:
    """Publish again what a stage that worked in `work` has published; return None when it did not get that far.

    An output is hashed before it is recorded, which takes long for large ones. When that is killed, the stage runs
    again, and DVC has deleted the output before. Then nothing is computed twice.
    """
    kept = work / KEPT
    try:
        report = Report(**json.loads(kept.with_suffix(".json").read_text()))
    except FileNotFoundError:
        return None
    again = work / f".{KEPT}.again"
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(kept, again, copy_function=os.link)
    replace_folder(again, output)
    return report


def discard_published(work: Path) -> None:
    """Forget what was published from `work`; work in progress stays."""
    (work / KEPT).with_suffix(".json").unlink(missing_ok=True)
    shutil.rmtree(work / KEPT, ignore_errors=True)
