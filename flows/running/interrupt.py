"""Ending the work of a thread from another one, at once: its lease was lost, or its volume is full."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from svd.core.errors import UserError

SIGNAL = signal.SIGUSR1


class _Interrupted(BaseException):
    """Raised in the middle of the work; the reason itself outside of `interruptible`.

    No UserError: a stage that notes what is wrong with a source, and goes on, would take it for that.
    """


@dataclass
class _Block:
    """The blocks that a thread is in, one within the other, and why it was interrupted; that happens once."""

    depth: int = 0
    reason: UserError | None = None


_blocks: dict[threading.Thread, _Block] = {}


@contextmanager
def interruptible() -> Iterator[None]:
    """Let this thread be interrupted. The handler stays: a signal that comes late must not end the process."""
    thread = threading.current_thread()
    if thread is threading.main_thread():
        signal.signal(SIGNAL, _raise_in_main)
    _blocks.setdefault(thread, _Block()).depth += 1
    try:
        yield
    except _Interrupted:
        raise _blocks[thread].reason or AssertionError from None
    finally:
        _blocks[thread].depth -= 1
        if not _blocks[thread].depth:
            del _blocks[thread]


def _raise_in_main(number: int, frame: FrameType | None) -> None:
    block = _blocks.get(threading.main_thread())
    if block and block.reason:  # else it was meant for a block that has ended already
        raise _Interrupted


def interrupt(thread: threading.Thread, reason: UserError) -> None:
    """Raise `reason` in a thread that is `interruptible`: in the main one even out of a system call.

    Two leases are often lost together. The second must not interrupt the cleaning up behind the first.
    """
    block = _blocks.get(thread)
    if block is None or block.reason:
        return
    block.reason = reason
    if thread is threading.main_thread():
        signal.pthread_kill(thread.ident or 0, SIGNAL)
    else:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Interrupted))
