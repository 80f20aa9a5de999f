"""A journal of what a run logs to MLflow: written to disk first, delivered in the background, each entry once.

MLflow may be away for a minute or for good: the stage goes on, the journal keeps what was logged, and a later run or
`svd track flush` delivers the rest. Delivery is at least once by a saved offset, and every operation is idempotent
(runs are found by a tag, metrics carry their own timestamp, artifacts have fixed names), so nothing shows up twice.
"""

from __future__ import annotations

import contextvars
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from svd.core.addresses import public_text
from svd.core.files import atomic_file, write_text

logger = logging.getLogger(__name__)
REQUEST_SECONDS = 25
UPLOAD_PATIENCE = 120.0  # seconds for a model, and for each 2 MB of it one more
UPLOAD_RATE = 2e6
Deliver = Callable[[dict[str, Any], Path], None]


class Journal:
    """An append-only file of operations, with the files they refer to beside it.

    folder/journal.jsonl holds one JSON object per line; folder/offset the number of bytes that were delivered;
    folder/files the copies of logged files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "journal.jsonl"
        self._offset = folder / "offset"
        self._lock = threading.Lock()
        (folder / "files").mkdir(parents=True, exist_ok=True)
        self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        """Cut off a last line without its end, which a kill in the middle of a write leaves."""
        if self.path.exists() and not (data := self.path.read_bytes()).endswith(b"\n"):
            with self.path.open("rb+") as stream:
                stream.truncate(data.rfind(b"\n") + 1)

    def append(self, operation: dict[str, Any]) -> None:
        """Add an operation; it is on disk when this returns."""
        line = json.dumps(operation, default=float).encode() + b"\n"
        with self._lock, self.path.open("ab") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())

    def keep_file(self, source: Path, name: str) -> None:
        """Copy `source` to files/`name`, so that it can be delivered after the stage has moved on."""
        with atomic_file(self.folder / "files" / name) as target:
            shutil.copyfile(source, target)

    def entries(self, operation: str) -> Iterator[dict[str, Any]]:
        """Yield all entries of one kind, delivered or not."""
        if self.path.exists():
            with self.path.open() as stream:
                for line in stream:
                    if (entry := json.loads(line))["op"] == operation:
                        yield entry

    def delivered(self) -> int:
        """Return how many bytes of the journal were delivered."""
        return int(self._offset.read_text()) if self._offset.exists() else 0

    def pending(self) -> bool:
        """Return whether something is left to deliver."""
        return self.path.exists() and self.delivered() < self.path.stat().st_size

    def waiting(self, operation: str) -> bool:
        """Return whether an entry of this kind is left to deliver."""
        if not self.pending():
            return False
        with self.path.open("rb") as stream:
            stream.seek(self.delivered())
            return any(json.loads(line)["op"] == operation for line in stream if line.endswith(b"\n"))

    def deliver(self, send: Deliver) -> None:
        """Deliver all complete entries in order; whatever `send` raises leaves the rest pending."""
        with self.path.open("rb") as stream:
            stream.seek(self.delivered())
            while (line := stream.readline()).endswith(b"\n"):
                send(json.loads(line), self.folder / "files")
                write_text(self._offset, str(stream.tell()))


class Courier:
    """A thread that delivers a journal while the stage runs, and waits longer after every failure."""

    def __init__(self, journal: Journal, send: Deliver, describe: str, *, first_wait: float = 1, longest: float = 30):
        self.journal = journal
        self._send = send
        self._describe = describe
        self._waits = (first_wait, longest)
        self._failure: str | None = None
        self._stop = threading.Event()
        self._deadline = 0.0
        # in the caller's context, so that Prefect knows which flow run the warnings belong to
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run,), name="mlflow-courier", daemon=True)
        self._thread.start()

    def _attempt(self) -> bool:
        try:
            if self.journal.pending():
                self.journal.deliver(self._send)
        except Exception as error:  # whatever the server or the network does must not stop a training
            if self._failure is None:
                logger.warning("%s; the run goes on, its log waits in %s", self._reason(error), self.journal.folder)
            self._failure = self._reason(error)
            return False
        if self._failure is not None:
            logger.warning("%s answers again; what waited was sent", self._describe)
            self._failure = None
        return True

    def _reason(self, error: Exception) -> str:
        lines = public_text(str(error)).splitlines()
        return f"{self._describe} can't be reached ({type(error).__name__}: {lines[0][:160] if lines else ''})"

    def _run(self) -> None:
        wait = self._waits[0]
        while not self._stop.wait(wait):
            wait = self._waits[0] if self._attempt() else min(2 * wait, self._waits[1])
        while not self._attempt() and time.monotonic() + self._waits[0] < self._deadline:
            time.sleep(self._waits[0])

    def close(self, patience: float = 20, upload_patience: float | None = None) -> bool:
        """Stop; try for `patience` seconds to deliver what is left. Returns whether everything was delivered.

        A delivery that hangs in a slow server is not waited for longer than that (but for one request's time at
        least); what it may still deliver is recognised when the journal is sent again. A model is waited for longer,
        `upload_patience` seconds in all (default: by its size), because it names weights that lie on this machine,
        which may be a pod; unless `patience` is 0, also for a server that is away.
        """
        upload = 0.0
        if self.journal.waiting("model"):
            upload = self._upload_seconds() if upload_patience is None else upload_patience
        self._deadline = time.monotonic() + (max(patience, upload) if patience else 0)
        self._stop.set()
        self._thread.join(max(patience, REQUEST_SECONDS, upload))
        return not self._thread.is_alive() and not self.journal.pending()

    def _upload_seconds(self) -> float:
        folders = {folder for entry in self.journal.entries("model") for folder in entry.get("folders", {}).values()}
        files = (path for folder in folders for path in Path(folder).rglob("*") if path.is_file())
        return UPLOAD_PATIENCE + sum(path.stat().st_size for path in files) / UPLOAD_RATE
