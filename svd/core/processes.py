"""Which process of which machine: a name that no other one has had since the machine started."""

from __future__ import annotations

import os
from pathlib import Path


def process_name(pid: int) -> str:
    """Return `boot/namespace/pid/start` of a process of this machine; empty: it is gone, or the system doesn't tell.

    Its start counts in ticks since the boot: a time of day would change whenever the clock is set.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{pid}/{ticks}"
    except OSError:
        return ""


def exists(pid: int) -> bool:
    """Return whether this machine has a process of that number, though /proc hide it from us (`hidepid`)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
