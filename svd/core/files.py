"""Atomic files and folders, and locks between processes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with sorted keys and a final newline, so that equal values are equal bytes."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as stream:
        json.dump(value, stream, indent=2, sort_keys=True, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


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
