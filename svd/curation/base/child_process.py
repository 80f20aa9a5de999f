"""Helpers of the child processes of a run. The imports are few because every child process pays for their memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection, wait
from typing import Any


def end_with_parent() -> None:
    """Wait for the parent's end, then end this process at once, so that a killed run leaves no child that still writes.

    Run it in a daemon thread of the child.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def exit_name(code: int | None) -> str:
    """Name how a process ended: a signal such as "SIGKILL", or its exit status."""
    if code is None:
        return "no exit status"
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def receive(connection: Connection) -> Any:
    """Return the next message of another process; raises EOFError when that has ended.

    A process that is killed while it writes a large message leaves half of it: an OSError without a number.
    """
    try:
        return connection.recv()
    except OSError as error:
        raise EOFError from error
