"""The Prefect server that `svd pipeline` starts for itself: it stays until the pipeline has ended, and no longer.

In the terminal's process group Ctrl-C would end it before the pipeline, which then waits for it in vain; and nothing
would end it after a pipeline that is killed.
"""

from __future__ import annotations

import os
import signal
import threading
import time

EPHEMERAL = "PREFECT__SERVER_EPHEMERAL"  # as Prefect marks such a server
WATCH_SECONDS = 1
GRACE_SECONDS = 5


def is_temporary() -> bool:
    """Return whether this process is such a server."""
    return os.environ.get(EPHEMERAL) == "1"


def end_with_parent() -> None:
    """Leave the terminal's process group, and end this process when the one that started it is gone."""
    if os.getpgrp() != os.getpid():
        os.setsid()
    threading.Thread(target=_watch, args=(os.getppid(),), name="end-with-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)
