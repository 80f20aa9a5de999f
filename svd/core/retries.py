"""Trying again: what to do when a network or a server fails for a while."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from svd.core.errors import UserError

T = TypeVar("T")
# With full jitter about a minute in the mean: long enough for a server that is restarted.
ATTEMPTS = 14
FIRST_WAIT = 0.25
LONGEST_WAIT = 15.0


class Transient(Exception):
    """A failure that may pass; the message is one line for people, the cause is chained."""


class Unreachable(UserError, OSError):
    """A server that did not answer in all attempts. Unlike other users' errors, a later try of the stage may work."""


def retrying(action: Callable[[], T], what: str) -> T:
    """Call `action` until it raises no `Transient`, waiting up to 0.25 s * 2^n (full jitter, 15 s at most) in between.

    Raises Unreachable that names `what` when the attempts are used up; all other exceptions pass through.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except Transient as error:
            last = error
        if attempt + 1 < ATTEMPTS:
            time.sleep(random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)))
    raise Unreachable(f"{what}: {last} ({ATTEMPTS} attempts)") from last
