"""Kill -9 at random points of curation: run again, it ends with the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from curation_inputs import tree, write_broken, write_encoders, write_sources

HERE = Path(__file__).resolve().parent
# 50 were done by hand; each costs a fresh interpreter with torch.
KILLS = int(os.environ.get("SVD_TEST_KILLS", "6"))


def start(sources: Path, encoders: Path, folder: Path) -> subprocess.Popen:
    """A run in a session of its own, so that its worker processes die with it."""
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}", "SVD_NO_PROGRESS": "1"}
    command = [sys.executable, str(HERE / "curate_once.py"), str(sources), str(encoders), str(folder)]
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)


def files(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*")) if folder.exists() else 0


@pytest.mark.slow
def test_killed_at_random_points_the_result_is_the_same(tmp_path):
    sources, encoders = write_sources(tmp_path / "sources", train=4, test=2), write_encoders(tmp_path / "encoders")
    write_broken(sources / "footage", sources / "train" / "train_0000.mp4")
    undisturbed = start(sources, encoders, tmp_path / "whole")
    assert undisturbed.wait(300) == 0, undisturbed.stderr.read()
    generator, killed, folder = random.Random(0), 0, tmp_path / "killed"
    for attempt in range(20 * KILLS):
        run = start(sources, encoders, folder)
        if killed < KILLS:
            # Wait until this run has written something, then a random while, longer with every attempt.
            before = files(folder / "work")
            while run.poll() is None and files(folder / "work") == before:
                time.sleep(0.01)
            wait = time.monotonic() + generator.uniform(0, 0.3 + 0.2 * attempt)
            while run.poll() is None and time.monotonic() < wait:
                time.sleep(0.01)
        else:
            run.wait(300)
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            killed += 1
            continue
        assert run.returncode == 0, run.stderr.read()
        if killed >= KILLS:
            break
        # It got through before the kill: take away the end, so that the next kill hits the merge or the publishing.
        (folder / "output").rename(folder / f"output{attempt}")
    assert killed == KILLS
    assert tree(folder / "output") == tree(tmp_path / "whole" / "output")
