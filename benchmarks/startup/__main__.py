"""How long commands take to start, beside `import torch`: `python -m benchmarks.startup [--repeats 5]`.

Runs the commands one after the other, repeatedly, and prints the median CPU time of each (user and system, with its
child processes) and its share of that of `import torch`. Demanded: `svd --help` 0.15, `svd doctor` 1.3.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SVD = str(Path(sys.executable).parent / "svd")
BASE = "import torch"
COMMANDS = {
    BASE: [sys.executable, "-c", BASE],
    "python": [sys.executable, "-c", ""],
    "svd --version": [SVD, "--version"],
    "svd --help": [SVD, "--help"],
    "svd stages": [SVD, "stages"],
    "svd doctor": [SVD, "doctor"],
}
ALLOWED = {"svd --help": 0.15, "svd doctor": 1.3}


def cpu_seconds(command: Sequence[str]) -> float:
    """Run a command to its end; return the CPU time of it and its children in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(repeats: int) -> dict[str, float]:
    """Return the median CPU time in seconds of every command; the first round only warms the caches."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(repeats + 1):
        for name, command in COMMANDS.items():
            seconds = cpu_seconds(command)
            if number:
                taken[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    """Measure, print a row per command, and exit with 1 when one takes more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each command; the median counts")
    medians = measure(parser.parse_args().repeats)
    slow = False
    for name, seconds in medians.items():
        share = seconds / medians[BASE]
        slow |= share > ALLOWED.get(name, share)
        allowed = f"   allowed {ALLOWED[name]}" if name in ALLOWED else ""
        print(f"{name:16} {seconds:7.3f} s   {share:6.3f} x {BASE}{allowed}")
    sys.exit(1 if slow else 0)


if __name__ == "__main__":
    main()
