"""What a stage is: a function that reads folders, writes its own folder and can be killed and run again at any moment.

Work in progress lives in an untracked `work` folder; `publish` moves the finished result into the output folder by
renames, because DVC deletes a stage's outputs before it runs the command again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    """Write `metrics.json` into `finished`, then make it `output`; a kill leaves the old or the new folder."""
    write_json(finished / "metrics.json", dict(report.metrics))
    replace_folder(finished, output)
    return report


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Wait until no other process of this machine holds the file `lock`, and hold it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def replace_folder(finished: Path, folder: Path) -> None:
    """Make `finished` the new `folder`. Between two renames there is none; `recover` undoes a kill just there."""
    with exclusive(_beside(folder, "lock")):
        _settle(folder)
        if folder.exists():
            folder.rename(_beside(folder, "old"))
        finished.rename(folder)
        _settle(folder)


def recover(folder: Path) -> None:
    """After a kill inside `replace_folder`: bring the old folder back when there is no new one, else remove it."""
    if _beside(folder, "old").exists() or _beside(folder, "removed").exists():
        with exclusive(_beside(folder, "lock")):
            _settle(folder)


def _settle(folder: Path) -> None:
    """One folder instead of two. What goes is renamed first, because half of it must never be taken for the whole."""
    old, removed = _beside(folder, "old"), _beside(folder, "removed")
    shutil.rmtree(removed, ignore_errors=True)
    if old.exists() and not folder.exists():
        old.rename(folder)
    elif old.exists():
        old.rename(removed)
        shutil.rmtree(removed)


def _beside(folder: Path, mark: str) -> Path:
    return folder.with_name(f".{folder.name}.{mark}")
