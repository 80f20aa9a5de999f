"""Leases in a store: one executor for a stage, and one for a pipeline, over all machines; with fencing tokens.

A lease is an object `<store>/leases/<preset>/<name>.json` that changes by conditional writes only:
`{"token": 3, "owner": "host:pid:uuid", "beat": 17, ...}`. Its holder renews it every `beat_seconds()`. Others hold the
holder for dead when the object didn't change for 4.5 beats of *their own* clock (the holder's beats, if its pace is
slower than theirs); no two clocks are ever compared. Taking over makes the token grow. A holder that finds another
version, or couldn't renew for 3 beats, has lost its lease and stops at once. What it could still write is refused: by
the token in the pointer (flows/recording/results_store.py) and the version of the snapshot
(flows/recording/work_store.py).

docs/stores.md says what the servers really do with conditional writes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

from flows.recording.results_store import Fence, LeaseExpired, LeaseLost, highest_token
from flows.running.interrupt import interrupt, interruptible
from svd import storage
from svd.core.environment import seconds_from
from svd.core.errors import UserError
from svd.core.processes import exists, process_name

T = TypeVar("T")
logger = logging.getLogger(__name__)
LOST, DEAD = 3.0, 4.5  # in beats; between them the old holder has time to stop
RELEASE_SECONDS = 10
AWAY_SECONDS = 900
CLEANING = "gc"
_checked: set[str] = set()  # stores whose conditional writes this process has tried


def beat_seconds() -> float:
    """Return the seconds between two renewals: 20, or SVD_LEASE_BEAT; raises UserError when that is no number."""
    return seconds_from("SVD_LEASE_BEAT", 20)


def dead_seconds(record: Mapping[str, Any]) -> float:
    """Return the seconds after which a lease is a dead holder's, if it still says what `record` says."""
    return DEAD * max(beat_seconds(), float(record.get("seconds", 0)))


def _clock() -> float:
    """Return seconds that also pass while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _is_dead(record: dict[str, Any]) -> bool:
    """Return whether the holder surely is: a process of this machine that no longer exists."""
    place, here = str(record.get("process", "")), process_name(os.getpid())
    if not place or place.split("/")[:2] != here.split("/")[:2]:
        return False
    pid = int(place.split("/")[2])
    name = process_name(pid)
    return name != place if name else not exists(pid)


@dataclass(frozen=True)
class _Seen:
    """A lease as an observer found it."""

    record: dict[str, Any]
    version: str | None


def _look(location: str) -> _Seen:
    try:
        version = storage.version(location)
        record = json.loads(storage.read_bytes(location))
        return _Seen({**record, "token": int(record["token"]), "owner": str(record["owner"])}, version)
    except FileNotFoundError:
        return _Seen({"token": 0, "owner": "", "beat": 0}, None)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{location}: not a lease; delete it when nobody works there") from None


class Lease:
    """A lease that this process holds. `waited` says that another one held it before."""

    def __init__(self, location: str, name: str, token: int, waited: bool) -> None:
        self.location, self.fence, self.waited = location, Fence(name, token), waited
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._thread = threading.current_thread()
        self._children = set(psutil.Process().children(recursive=True))
        self._version: str | None = None
        self._beat = 0
        self._renewed = _clock()
        self._lost: LeaseLost | None = None
        self._renewing = threading.Lock()
        self._stop = threading.Event()

    def _record(self, owner: str) -> bytes:
        self._beat += 1
        record = {"token": self.fence.token, "owner": owner, "beat": self._beat, "seconds": beat_seconds()}
        return json.dumps(record | {"process": process_name(os.getpid()), "id": uuid.uuid4().hex}).encode()

    def take(self, version: str | None) -> None:
        """Write the lease over `version`; raises svd.storage.Conflict when another one was faster."""
        started = _clock()
        self._version = storage.replace(self.location, self._record(self.owner), version)
        self._renewed = started

    def check(self) -> None:
        """Renew the lease now; raises LeaseLost when it is another's or can't be renewed in time."""
        if not self._lost:
            self._renew()
        if self._lost:
            raise self._lost

    def _renew(self) -> None:
        with self._renewing:
            try:
                self.take(self._version)
            except storage.Conflict:
                self._lose(LeaseLost, f"to {_look(self.location).record['owner'] or 'nobody'}")

    def start(self) -> None:
        """Renew from now on, in the background."""
        for action in (self._renew_regularly, self._watch):
            threading.Thread(target=action, name=f"lease {self.fence.lease}", daemon=True).start()

    def _renew_regularly(self) -> None:
        while not self._stop.wait(beat_seconds()) and not self._lost:
            with contextlib.suppress(UserError, OSError):  # the store is away: `_watch` counts the seconds
                self._renew()

    def _watch(self) -> None:
        while not self._stop.wait(beat_seconds() / 20) and not self._lost:
            if _clock() - self._renewed > LOST * beat_seconds():
                seconds = f"{LOST * beat_seconds():.0f} s"
                self._lose(LeaseExpired, f"(not renewed for {seconds}: this process or the store stood still)")

    def _lose(self, kind: type[LeaseLost], reason: str) -> None:
        if self._lost or self._stop.is_set():
            return
        self._lost = kind(f"lease of '{self.fence.lease}' lost {reason}; this process stops and publishes nothing")
        logger.error("%s", self._lost)
        for child in set(psutil.Process().children(recursive=True)) - self._children:
            with contextlib.suppress(psutil.Error):
                child.terminate()
        interrupt(self._thread, self._lost)

    def release(self) -> None:
        """Let others have the lease at once; where the store is away they take it when it has expired."""
        self._stop.set()
        writer = threading.Thread(target=self._give_up, daemon=True)
        writer.start()
        writer.join(RELEASE_SECONDS)

    def _give_up(self) -> None:
        with self._renewing, contextlib.suppress(UserError, OSError, storage.Conflict):
            if not self._lost:
                storage.replace(self.location, self._record(""), self._version)


@contextmanager
def held(root: str, preset: str, name: str) -> Iterator[Lease]:
    """Hold the lease `name` of a preset in a store; while another process holds it, wait and say so in one line.

    Inside, LeaseLost can be raised at any moment in this thread. Raises UserError for a store that can't serve leases.
    """
    location = storage.join(root, "leases", preset, f"{name}.json")
    with _holding_at(root, location, name, highest_token(root, preset, name)) as lease:
        _await_free(_cleaning(root), CLEANING)
        yield lease


def retry_expired(work: Callable[[], T], root: str) -> T:
    """Call `work`, which holds leases in the store `root`; call it again whenever one has expired.

    Before that, wait until the store answers, at most 15 minutes. `work` finds what it finished before in the store.
    """
    while True:
        try:
            return work()
        except LeaseExpired as error:
            logger.warning("%s; it goes on when the store answers", error)
            _await_store(root)


def _await_store(root: str) -> None:
    deadline = _clock() + AWAY_SECONDS
    while True:
        try:
            _look(_cleaning(root))
            return
        except OSError:
            if _clock() > deadline:
                raise
            time.sleep(beat_seconds() / 10)


@contextmanager
def held_for_cleaning(root: str) -> Iterator[Lease]:
    """Hold the store's only lease for garbage collection: nobody who takes another one meanwhile begins to work.

    Who holds one already is the caller's to look for.
    """
    with _holding_at(root, _cleaning(root), CLEANING) as lease:
        yield lease


def _cleaning(root: str) -> str:
    return storage.join(root, "leases", f"{CLEANING}.json")


@contextmanager
def _holding_at(root: str, location: str, name: str, least: int = 0) -> Iterator[Lease]:
    """Hold the lease at `location`, with a token above `least`."""
    lease = _acquire(location, name, least)
    with interruptible():
        lease.start()
        try:
            _check_store(root, lease)
            yield lease
        finally:
            lease.release()


def _acquire(location: str, name: str, least: int) -> Lease:
    waited = False
    while True:
        seen, was_held = _await_free(location, name)
        waited |= was_held
        lease = Lease(location, name, max(least, seen.record["token"]) + 1, waited)
        with contextlib.suppress(storage.Conflict):
            lease.take(seen.version)
            return lease


def _await_free(location: str, name: str) -> tuple[_Seen, bool]:
    """Wait until nobody holds a lease; return what it says then, and whether somebody held it before."""
    waited, known, since = False, "", _clock()
    while True:
        seen = _look(location)
        if seen.version != known:
            known, since = seen.version or "", _clock()
        if not seen.record["owner"] or _is_dead(seen.record) or _clock() - since > dead_seconds(seen.record):
            return seen, waited
        if not waited:
            logger.warning("'%s' is held by %s (%s); waiting for it", name, seen.record["owner"], location)
            waited = True
        time.sleep(beat_seconds() / 10)


def _check_store(root: str, lease: Lease) -> None:
    """Raise UserError when the store ignores conditions: its leases would be worth nothing."""
    if root in _checked:
        return
    with lease._renewing:
        try:
            storage.replace(lease.location, lease._record(lease.owner), None)
        except storage.Conflict:
            _checked.add(root)
            return
    raise UserError(
        f"{root}: this store ignores conditional writes, so two machines could run one stage (docs/stores.md)"
    )
