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

KEPT = "published"


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
    """Write `metrics.json` into `finished`, then make it `output`; a kill leaves the old or the new folder.

    Until the work folder is removed, hard links beside `finished` keep what was published: see `republish`.
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
    """Publish again what a stage that worked in `work` has published; None when it did not get that far.

    Whoever records an output hashes it first, which takes long for large ones. When that is killed, the stage runs
    again, and DVC has deleted the output before.
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
