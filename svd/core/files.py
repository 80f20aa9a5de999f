"""Atomic files and folders, and locks between processes.

`atomic_file` and `atomic_folder` yield a temporary path beside the target. Its content becomes the target as a whole
when the block ends; a failure, a kill or a power cut at any moment leaves the old or the new content, never half:

    with atomic_file(Path("scores.csv")) as temporary:
        temporary.write_text("clip,score\\n")
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_held: set[int] = set()  # descriptors of the locks that this process holds


class Held(Exception):
    """Another process holds a lock; `holder` is its process id as text, empty where it is unknown."""

    def __init__(self, lock: Path, holder: str) -> None:
        super().__init__(f"{lock} is held by process {holder or 'unknown'}")
        self.holder = holder


@contextmanager
def atomic_file(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary file beside `path` that replaces it when the block ends, synced; remove it after a failure.

    The temporary file is there and empty at first. Folders on the way are made. Writers of the same path in several
    threads or processes get different temporary files, and the last one to finish wins. A killed writer leaves
    `.NAME.tmp`, which the next writer takes over. mode: permissions of the file (default: by the umask).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, descriptor = _own_temporary(path)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)
        os.ftruncate(descriptor, 0)
        yield temporary
        if mode is not None:
            temporary.chmod(mode)  # some writers put a file of their own in its place
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        _release(descriptor)
    _sync_folder(path.parent)


def _own_temporary(path: Path) -> tuple[Path, int]:
    """A temporary file that no living writer uses, and the descriptor of its lock."""
    for number in itertools.count():
        temporary = path.with_name(f".{path.name}.{number}.tmp" if number else f".{path.name}.tmp")
        descriptor = _acquire(temporary, wait=False)
        if descriptor is not None:
            return temporary, descriptor
    raise AssertionError


def discard_temporary(path: Path) -> None:
    """Remove what a killed writer of `path` left. Only for callers that know that nobody is writing it."""
    path.with_name(f".{path.name}.tmp").unlink(missing_ok=True)


def replace_file(finished: Path, path: Path) -> None:
    """Sync the file `finished` and rename it to `path`: for a writer that keeps its temporary file over a kill."""
    _sync(finished)
    finished.replace(path)
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; folders on the way are made."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with sorted keys and a final newline, so that equal values are equal bytes.

    Raises ValueError for NaN and infinity, which JSON lacks.
    """
    with atomic_file(path) as temporary, temporary.open("w") as stream:
        json.dump(value, stream, indent=2, sort_keys=True, allow_nan=False)
        stream.write("\n")


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder` that replaces it when the block ends, with all files synced.

    It is removed after a failure. Another writer of the same folder waits until this one has finished. What killed
    writers left is removed first. An existing folder is replaced as by `replace_folder`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _beside(folder, "lock")
    with exclusive(lock):
        _remove_leftovers(folder)
        # A new name every time: what a child process of a killed writer still writes must not get into this folder.
        temporary = _beside(folder, f"{uuid.uuid4().hex}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            _sync_tree(temporary)
            _settle(folder)
            _exchange(temporary, folder)
        except BaseException:
            _settle(folder)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            lock.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of killed writers; the caller holds the lock, so none of them is in use."""
    for entry in os.scandir(folder.parent):
        if entry.name.startswith(f".{folder.name}.") and entry.name.endswith(".tmp") and entry.is_dir():
            shutil.rmtree(entry.path, ignore_errors=True)


def replace_folder(finished: Path, folder: Path) -> None:
    """Make `finished` the new `folder`. Between two renames there is none; `recover` undoes a kill just there.

    Where the two lie on different file systems, `finished` is copied beside `folder` first.
    """
    with exclusive(_beside(folder, "lock")):
        _settle(folder)
        try:
            _exchange(finished, folder)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _settle(folder)
            _exchange(_copied_beside(finished, folder), folder)
            shutil.rmtree(finished)


def recover(folder: Path) -> None:
    """After a kill inside `replace_folder`: bring the old folder back when there is no new one, else remove it."""
    if any(_beside(folder, mark).exists() for mark in ("old", "removed", "copy")):
        with exclusive(_beside(folder, "lock")):
            _settle(folder)


def _exchange(finished: Path, folder: Path) -> None:
    if folder.exists():
        folder.rename(_beside(folder, "old"))
    finished.rename(folder)
    _sync_folder(folder.parent)
    _settle(folder)


def _settle(folder: Path) -> None:
    """One folder instead of two. What goes is renamed first, because half of it must never be taken for the whole."""
    old, removed, copy = (_beside(folder, mark) for mark in ("old", "removed", "copy"))
    shutil.rmtree(removed, ignore_errors=True)
    if copy.exists():
        shutil.rmtree(copy)
    if old.exists() and not folder.exists():
        old.rename(folder)
    elif old.exists():
        old.rename(removed)
        shutil.rmtree(removed)


def _copied_beside(finished: Path, folder: Path) -> Path:
    copy = _beside(folder, "copy")
    shutil.copytree(finished, copy, symlinks=True)
    _sync_tree(copy)
    return copy


def _beside(folder: Path, mark: str) -> Path:
    return folder.with_name(f".{folder.name}.{mark}")


@contextmanager
def exclusive(lock: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `lock` against other processes and threads of this machine. It ends with its process.

    Waits until the lock is free; with `wait` false, raises Held at once instead and names the holder.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(lock, wait)
    if descriptor is None:
        raise Held(lock, lock.read_text().strip() if lock.exists() else "")
    try:
        if not wait:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        _release(descriptor)


def _acquire(path: Path, wait: bool) -> int | None:
    """Lock the file `path`, which is made where it is missing; None when another holds it and `wait` is false."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(descriptor, path):
                _held.add(descriptor)
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`: its last holder may have renamed or removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _release(descriptor: int) -> None:
    if descriptor in _held:  # not in a fork, which has closed it
        _held.discard(descriptor)
        os.close(descriptor)


def _close_in_child() -> None:
    """A fork must not hold the locks of its parent: it may outlive a parent that is killed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_in_child)


def _sync(path: Path) -> None:
    """Write to the disk what the system still holds back of a file, or of the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    try:
        _sync(folder)
    except OSError as error:
        # Some network file systems can't sync a folder, and one without read permission can't be opened.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def _sync_tree(folder: Path) -> None:
    """Sync every file and folder inside `folder`, and itself."""
    for parent, _, names in os.walk(folder, topdown=False):
        for path in (Path(parent, name) for name in names):
            if path.is_file() and not path.is_symlink():
                _sync(path)
        _sync_folder(Path(parent))
