"""What a stage is: a function that reads folders, writes its own folder and can be killed and run again at any moment.

Work in progress lives in an untracked `work` folder; `publish` moves the finished result into the output folder in one
rename, because DVC deletes a stage's outputs before it runs the command again.
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


class UserError(Exception):
    """A user's mistake: one line that says what is wrong, in which file, and what to do. Shown without a traceback."""


class Tracker(Protocol):
    """Where a stage reports while it runs; MLflow in `flows/tracking.py`, nothing by default."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Scalars at a step."""

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """An (H, W, 3) uint8 picture at a step."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """A file to keep with the run."""


class NoTracker:
    """A tracker that drops everything."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """Nothing."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Nothing."""


@dataclass(frozen=True)
class StageContext:
    """What a stage runs with.

    inputs: folder of each input by the name of the stage that made it; output: the folder this stage publishes;
    work: the untracked folder for work in progress, kept when the stage is killed.
    """

    preset: Preset
    inputs: Mapping[str, Path]
    output: Path
    work: Path
    tracker: Tracker = field(default_factory=NoTracker)


@dataclass(frozen=True)
class Report:
    """What a stage found: `metrics` are written to `metrics.json`; `summary` is one line for people."""

    metrics: Mapping[str, float | int | str]
    summary: str


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with sorted keys and a final newline, so that equal values are equal bytes."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as stream:
        json.dump(value, stream, indent=2, sort_keys=True, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def publish(finished: Path, output: Path, report: Report) -> Report:
    """Write `metrics.json` into `finished`, then rename it to `output`.

    A kill leaves the old or the new folder complete under the name, or, between two renames, none; run again, the stage
    publishes what it has finished.
    """
    write_json(finished / "metrics.json", dict(report.metrics))
    output.parent.mkdir(parents=True, exist_ok=True)
    old = output.with_name(f".{output.name}.old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    finished.rename(output)
    shutil.rmtree(old, ignore_errors=True)
    return report
