"""What the processes beside a run have in common. Imports next to nothing: those processes count their memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """Wait for the parent's death, then end at once: a killed run leaves nothing behind that decodes or writes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def exit_name(code: int | None) -> str:
    """How a process ended, for people."""
    if code is None:
        return "no exit status"
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
