"""Where the processes of flow runs print: not into the pipe of their worker, with which they would die."""

from __future__ import annotations

import os
import sys
from pathlib import Path

STACK = "SVD_STACK"  # the stack's folder, which flows/stack/processes.py gives to all of its processes
LOG = Path("log") / "flows.log"


def leave_worker_pipe() -> None:
    """Append what this process and its children print to the stack's log/flows.log, if a worker of `svd stack` runs it.

    A worker reads its flow runs through pipes. When it is killed, the next line that is printed would be a broken pipe,
    which ends a process in the middle of a stage. Pods and containers end with their worker anyway.
    """
    stack = os.environ.get(STACK)
    if not (stack and os.environ.get("PREFECT__FLOW_RUN_ID")):
        return
    with (Path(stack) / LOG).open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
