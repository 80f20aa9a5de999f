"""A run of the curation stage in a process that tells which phase it is in and, if asked, kills itself in the middle.

Python reports what it is about to do with files to an audit hook: there a process can be killed between any two
operations, also in phases that last less than a millisecond.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

from curation_inputs import context, tiny

from svd.curation import stage
from svd.curation.scoring import process as networks

MARK = "SVD_TEST_KILLED_RUN"  # an environment variable that all processes of a run share
PHASES = ("measuring", "scoring", "shards", "merging", "publishing")
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.rmdir", "shutil.rmtree")


def phase_of(path: str, folder: Path) -> int | None:
    """The phase that a file belongs to, from its place in the folder of the run; None outside it."""
    if not path.startswith(f"{folder}/"):
        return None
    place = path.removeprefix(f"{folder}/")
    if not place.startswith("work/") or place.endswith("/finished/.metrics.json.tmp"):
        return PHASES.index("publishing")
    if place.startswith("work/finished/"):
        return PHASES.index("merging")
    if place.startswith("work/scored/"):
        return PHASES.index("shards" if ".tar" in place else "scoring")
    return PHASES.index("measuring") if place.startswith("work/measured/") else None


def run_once(
    inputs: Path, folder: Path, mark: str, now: Any, counts: MutableSequence[int], kill: tuple[int, int] | None
) -> None:
    """Curate `inputs`/sources in `folder`. now: shared int, the phase; counts: shared, file operations by phase.

    kill: phase, and the number of the file operation in it before which the process kills itself.
    """
    os.environ[MARK] = mark
    os.environ["SVD_NO_PROGRESS"] = "1"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        phase = phase_of(os.fspath(arguments[0]), folder)
        if phase is None:
            return
        now.value = phase
        counts[phase] += 1
        if kill is not None and kill[0] == phase and kill[1] <= counts[phase]:
            os.kill(run, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    run = os.getpid()
    sys.addaudithook(hook)
    # A fork of this process: it has the hook, and torch already, which takes seconds to import in each of many runs.
    networks.START_METHOD = "fork"
    stage.run(context(tiny(sources__sources_per_shard=3), inputs / "sources", inputs / "encoders", folder))
