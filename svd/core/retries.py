"""Retries with exponential backoff, for networks and servers that fail for a while."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from svd.core.errors import UserError

T = TypeVar("T")
# With full jitter the waits sum to about a minute on average: long enough for a server that is restarted.
ATTEMPTS = 14
FIRST_WAIT = 0.25
LONGEST_WAIT = 15.0


class Transient(Exception):
    """A failure that may pass. The message is one line for people; the cause is chained."""


class Unreachable(UserError, OSError):
    """A server that did not answer in all attempts. Unlike after a user's mistake, a later try may work."""


def retrying(action: Callable[[], T], what: str, attempts: int | None = None) -> T:
    """Call `action` until it raises no `Transient`; return its result.

    attempts: how often it is tried (default: ATTEMPTS). The wait after attempt n is random, up to 0.25 s * 2^n and at
    most 15 s (full jitter). Raises Unreachable that names `what` when the attempts are used up. All other exceptions
    pass through.
    """
    attempts = attempts or ATTEMPTS
    for attempt in range(attempts):
        try:
            return action()
        except Transient as error:
            last = error
        if attempt + 1 < attempts:
            time.sleep(random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)))
    raise Unreachable(f"{what}: {last} ({attempts} attempts)") from last
