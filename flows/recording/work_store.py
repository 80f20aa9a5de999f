"""Work in progress in the store, so that an evicted stage goes on on another machine where it was.

While a stage runs, a thread mirrors its work folder to `<store>/work/<preset>/<stage>/<digest>/`: files by content in
`objects/`, then `manifest.json`, which names them, by a conditional write. What a manifest no longer names is removed
after it was replaced. So a reader finds the last whole snapshot, whenever the writer is killed; and a writer that was
taken for dead finds the manifest changed and stops.

The snapshot of a stage whose output was pushed is small: its report and the hash of its output. It is removed when the
output is recorded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any

from flows.places import run_key_of
from svd import storage
from svd.core.environment import seconds_from
from svd.core.errors import UserError
from svd.core.files import atomic_folder, sha256, write_text
from svd.core.retries import Unreachable
from svd.stage import KEPT

logger = logging.getLogger(__name__)
MANIFEST, OBJECTS, NOTE = "manifest.json", "objects", ".snapshot"
CLAIMS = 5
LAST_SECONDS = 60  # for the last snapshot of a stage that ends
REPORT_FILES = (f"{KEPT}.json", "delivered.json", "code.sha256", "cost.json")
Files = dict[str, dict[str, Any]]


def interval_seconds() -> float:
    """Return the seconds between two snapshots: 30, or SVD_SNAPSHOT_SECONDS; raises UserError if it is no number."""
    return seconds_from("SVD_SNAPSHOT_SECONDS", 30)


@dataclass(frozen=True)
class Snapshot:
    """What a manifest says: the files, the MLflow key of the run, and the hash of its output once that was pushed."""

    files: Files = field(default_factory=dict)
    run_key: str = ""
    output: str = ""
    version: str | None = None


def work_uri(root: str, work: Path) -> str:
    """Return where the snapshot of a work folder `work/<preset>/<stage>/<digest>` lies in a store."""
    return storage.join(root, "work", *work.parts[-3:])


def read_snapshot(uri: str) -> Snapshot:
    """Return the snapshot at `uri`; an empty one without version when there is none."""
    location = storage.join(uri, MANIFEST)
    try:
        version = storage.version(location)
        content = json.loads(storage.read_bytes(location))
        return Snapshot(content["files"], content["run_key"], content["output"], version)
    except FileNotFoundError:
        return Snapshot()
    except (ValueError, KeyError):
        logger.warning("%s is not a manifest; work in progress starts anew", location)
        return Snapshot(version=storage.version(location))


def restore(work: Path, uri: str) -> None:
    """Bring the work folder to the last snapshot, unless what is here is that one or newer.

    Every file is verified. A folder with a file that is missing or damaged there is left out: its part is done again.
    """
    note, stored = work / NOTE, read_snapshot(uri)
    here = note.read_text() if note.is_file() else "unknown" if any(work.glob("[!.]*")) else ""
    if not stored.files or here in (stored.version, "unknown"):
        return
    with atomic_folder(work) as folder:
        with ThreadPoolExecutor(8) as pool:
            arrived = pool.map(lambda item: _bring(uri, folder, *item), stored.files.items())
            lost = [name for name, whole in zip(stored.files, arrived, strict=True) if not whole]
        for name in lost:
            _leave_out(folder, name)
        (folder / NOTE).write_text(str(stored.version))
    if stored.run_key:
        write_text(run_key_of(work), stored.run_key)
    # A warning, so that it stands in the flow run's log: this run goes on where another machine was.
    logger.warning("%s: %d files of unfinished work brought from the store", work, len(stored.files) - len(lost))


def _bring(uri: str, folder: Path, relative: str, about: dict[str, Any]) -> bool:
    target = folder / relative
    try:
        storage.download(storage.join(uri, OBJECTS, about["sha256"]), target)
    except (FileNotFoundError, storage.Truncated):
        return False
    return sha256(target) == str(about["sha256"])


def _leave_out(folder: Path, relative: str) -> None:
    """Remove the files beside a lost one, which belong to it; at the top of the work folder the file alone."""
    logger.warning("%s of the unfinished work is damaged in the store; its part is done again", relative)
    lost = folder / relative
    beside = [lost] if lost.parent == folder else list(lost.parent.rglob("*"))
    for path in beside:
        if not path.is_dir():
            path.unlink(missing_ok=True)


class Mirror:
    """The writer of one work folder's snapshots."""

    def __init__(self, work: Path, uri: str) -> None:
        self.work, self.uri, self._interval = work, uri, interval_seconds()
        self._files: Files = {}
        self._version: str | None = None
        self._hashes: dict[Path, tuple[tuple[int, int, int], str]] = {}
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._claim()
        self._sent = {about["sha256"] for about in self._files.values()}

    def _claim(self) -> None:
        """Write the manifest as it is: from now on an earlier writer finds another version.

        That one may have its last word at this very moment, and is then read again.
        """
        for attempt in range(CLAIMS):
            before = read_snapshot(self.uri)
            self._version = before.version
            try:
                self._write(before.files)
                return
            except storage.Conflict:
                if attempt + 1 == CLAIMS:
                    raise

    def start(self) -> None:
        """Take snapshots from now on, in the background."""
        self._thread.start()

    def wake(self) -> None:
        """Take a snapshot now, in the background."""
        self._wake.set()

    def close(self) -> None:
        """Stop after one more snapshot; a store that hangs is waited for a minute."""
        self._stop.set()
        self._wake.set()
        self._thread.join(LAST_SECONDS)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._interval)
            self._wake.clear()
            try:
                self.snapshot()
            except storage.Conflict:
                logger.warning("%s: another executor works there; no more snapshots from here", self.uri)
                return
            except (UserError, OSError) as error:
                logger.warning("no snapshot of %s: %s", self.work, error)

    def snapshot(self) -> None:
        """Send what changed since the last snapshot. Raises svd.storage.Conflict when another writer took over.

        A folder one of whose files vanished or changed meanwhile stays as it was in the last snapshot. Nothing is sent
        once the result is published: then the work folder no longer holds the work, but the last snapshot does.
        """
        files = self._send()
        if not self._published() and files != self._files:
            self._replace(files)

    def _published(self) -> bool:
        return (self.work / f"{KEPT}.json").exists()

    def _send(self) -> Files:
        """Send the files of the work folder that the store lacks; return all that are whole there."""
        files: Files = {}
        unsettled: set[str] = set()
        for path in _visible(self.work):
            relative = path.relative_to(self.work).as_posix()
            try:
                files[relative] = self._send_file(path)
            except FileNotFoundError:
                unsettled.add(_unit(relative))
        for name in unsettled:
            files = {other: about for other, about in files.items() if not _inside(other, name)}
            files |= {other: about for other, about in self._files.items() if _inside(other, name)}
        return files

    def _send_file(self, path: Path) -> dict[str, Any]:
        """Send one file by its content; raises FileNotFoundError when it vanished or changed meanwhile."""
        before = _state(path)
        known = self._hashes.get(path)
        digest = known[1] if known and known[0] == before else sha256(path)
        if digest not in self._sent:
            self._upload(path, digest, before)
            if _state(path) != before:
                storage.delete(storage.join(self.uri, OBJECTS, digest))
                raise FileNotFoundError(path)
            self._sent.add(digest)
        self._hashes[path] = before, digest
        return {"sha256": digest, "size": before[0]}

    def _upload(self, path: Path, digest: str, before: tuple[int, int, int]) -> None:
        try:
            storage.upload(path, storage.join(self.uri, OBJECTS, digest))
        except Unreachable:
            raise
        except UserError:  # a store may refuse a large file that grows while it is sent
            if _state(path) == before:
                raise
            raise FileNotFoundError(path) from None

    def _write(self, files: Files, output: str = "") -> None:
        """Replace the manifest, whose version is noted in the work folder: by it `restore` knows what is newer."""
        key = run_key_of(self.work)
        content = {"files": files, "run_key": key.read_text() if key.is_file() else "", "output": output}
        data = json.dumps(content | {"writer": uuid.uuid4().hex}, sort_keys=True).encode()
        self._version = storage.replace(storage.join(self.uri, MANIFEST), data, self._version)
        self._files = files
        if self.work.is_dir():
            write_text(self.work / NOTE, self._version)

    def keep_only(self, paths: list[Path], output: str) -> None:
        """Write a last snapshot of these files and the hash of an output."""
        self._replace({path.name: self._send_file(path) for path in paths if path.is_file()}, output)

    def _replace(self, files: Files, output: str = "") -> None:
        """Write the manifest, then remove the objects that it no longer names.

        These are listed before: what comes later may be of a writer that took over while this one stood still.
        """
        stored = list(storage.list_files(storage.join(self.uri, OBJECTS)))
        self._write(files, output)
        named = {about["sha256"] for about in files.values()}
        for entry in stored:
            if entry.relative not in named:
                storage.delete(entry.location)
        self._sent &= named


def deliver(work: Path, uri: str, output: str) -> None:
    """Make the snapshot small: the report and the hash of the output that was pushed, which others can pull by it.

    Raises svd.storage.Conflict when another executor works there.
    """
    mirror = Mirror(work, uri)
    mirror.keep_only([work / name for name in REPORT_FILES], output)


def _visible(folder: Path) -> Iterator[Path]:
    """Yield the files that another machine could use: neither hidden or temporary ones, nor what was published."""
    for parent, names, files in os.walk(folder):
        top = Path(parent) == folder
        names[:] = sorted(name for name in names if not name.startswith(".") and not (top and name == KEPT))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _state(path: Path) -> tuple[int, int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ino


def _unit(relative: str) -> str:
    """Return what belongs together with a file: its folder, or at the top of the work folder the file alone."""
    parent = PurePosixPath(relative).parent.as_posix()
    return relative if parent == "." else parent


def _inside(relative: str, unit: str) -> bool:
    return relative == unit or relative.startswith(f"{unit}/")


@contextmanager
def mirrored(work: Path, uri: str) -> Iterator[Mirror]:
    """Mirror `work` to `uri` while the block runs; once more when it fails, and at once when SIGTERM arrives."""
    mirror = Mirror(work, uri)
    mirror.start()
    with _on_terminate(mirror):
        try:
            yield mirror
        finally:
            mirror.close()


@contextmanager
def _on_terminate(mirror: Mirror) -> Iterator[None]:
    """On SIGTERM, wake the mirror and go on as before; a process that would die at once unwinds instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        mirror.wake()
        if callable(before):
            before(number, frame)
        elif before != signal.SIG_IGN:
            raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        with contextlib.suppress(TypeError):  # a handler that was not set from Python
            signal.signal(signal.SIGTERM, before)


def forget(uri: str) -> None:
    """Remove a snapshot, its manifest first."""
    storage.delete(storage.join(uri, MANIFEST))
    for entry in list(storage.list_files(uri)):
        storage.delete(entry.location)


def forget_recorded(root: str, preset: str, stage: str, md5: str) -> None:
    """Remove the snapshots of a stage whose output `md5` was recorded; unfinished work for other options stays."""
    uri = storage.join(root, "work", preset, stage)
    for entry in list(storage.list_files(uri)):
        if PurePosixPath(entry.relative).name == MANIFEST and len(PurePosixPath(entry.relative).parts) == 2:
            folder = storage.join(uri, PurePosixPath(entry.relative).parts[0])
            if read_snapshot(folder).output == md5:
                forget(folder)
