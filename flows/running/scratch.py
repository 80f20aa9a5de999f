"""The scratch volume of a pod: a stage that outgrows it ends with one line.

Without this a kubelet evicts the pod, nobody says why, and the run that Prefect schedules again meets the same end.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flows.running.interrupt import interrupt, interruptible
from svd.core.errors import UserError

SIZE = Path("/etc/svd/pod/scratch_size")  # from the pod's annotation (infra/prefect/kubernetes-pools.yaml)
CHECK_SECONDS = 20.0  # a kubelet looks about once a minute
EASE = 50  # the pause after a walk over the volume, in times of what the walk took: millions of files take a minute
FULL = 0.95
PASSING = FileNotFoundError, NotADirectoryError, PermissionError  # changed meanwhile, or another user's
HINT = "raise `scratch_size` of the pool or the deployment and run the same command again, it goes on"
UNITS = {"": 1, **{f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", 1)}}
UNITS |= {letter: 1000**power for power, letter in enumerate("kMGTPE", 1)}


def bytes_of(quantity: str) -> int:
    """Return the bytes of a quantity as Kubernetes writes it; raises ValueError for anything else.

    >>> bytes_of("200Gi"), bytes_of("1.5k"), bytes_of("7")
    (214748364800, 1500, 7)
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([eE]-?\d+|[A-Za-z]*)", quantity.strip())
    if match is None or (match[2] not in UNITS and not match[2][1:]):
        raise ValueError(f"'{quantity}' is no quantity such as 200Gi")
    number, suffix = match.groups()
    return int(float(number + suffix) if suffix not in UNITS else float(number) * UNITS[suffix])


def used_bytes(folder: Path) -> int:
    """Return the bytes that a folder takes on its disk; a file with several names counts once."""
    seen: set[tuple[int, int]] = set()
    total, waiting = 0, [os.fspath(folder)]
    while waiting:
        with suppress(*PASSING), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with suppress(*PASSING):  # of this entry alone: the others still count
                    facts = entry.stat(follow_symlinks=False)
                    if (facts.st_dev, facts.st_ino) not in seen:
                        seen.add((facts.st_dev, facts.st_ino))
                        total += facts.st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
    return total


@contextmanager
def within_scratch(folder: Path) -> Iterator[None]:
    """Raise UserError in the middle of the block when `folder` fills its volume; outside a pod do nothing."""
    if not SIZE.is_file():
        yield
        return
    size, quantity = bytes_of(SIZE.read_text()), SIZE.read_text().strip()
    thread, ended = threading.current_thread(), threading.Event()

    def watch() -> None:
        pause = CHECK_SECONDS
        while not ended.wait(pause):
            began = time.monotonic()
            used = used_bytes(folder)
            pause = max(CHECK_SECONDS, EASE * (time.monotonic() - began))
            if used > FULL * size and not ended.is_set():  # it may have ended during a walk of a minute
                interrupt(
                    thread, UserError(f"{used:,} bytes of the pod's scratch volume ({quantity}) are used: {HINT}")
                )
                return

    with interruptible():
        threading.Thread(target=watch, name="scratch", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
