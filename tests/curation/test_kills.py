"""Kill -9 at fifty random points: run again, curation ends with the bytes of an undisturbed run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
from curation_inputs import SAMPLES, tree, write_broken, write_encoders, write_sources
from killed_run import MARK, PHASES, run_once

KILLS = 50


@dataclass
class Runs:
    """Runs of the stage, one after the other, in `folder`; they are forked from a process that has imported all."""

    inputs: Path
    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["svd.curation.stage", "svd.model.conditioning", "onnxruntime"])
        self.now = self.context.Value("i", -1, lock=False)
        self.counts = self.context.Array("i", len(PHASES), lock=False)

    def start(self, kill: tuple[int, int] | None = None) -> BaseProcess:
        """A run that kills itself before the given file operation of a phase, if that comes."""
        self.now.value = -1
        self.counts[:] = [0] * len(PHASES)
        arguments = self.inputs, self.folder, self.mark, self.now, self.counts, kill
        process = self.context.Process(target=run_once, args=arguments)
        process.start()
        return process

    def finish(self) -> int | None:
        """A run that nobody kills; returns its exit status."""
        process = self.start()
        process.join()
        return process.exitcode

    def processes(self) -> list[psutil.Process]:
        """All living processes of the runs, workers included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def workers(self, of: BaseProcess) -> list[psutil.Process]:
        """The decoding processes of a run."""
        return [p for p in self.processes() if p.pid != of.pid and "spawn_main" in " ".join(p.cmdline())]


@pytest.fixture
def inputs(tmp_path):
    write_encoders(tmp_path / "inputs" / "encoders")
    sources = write_sources(tmp_path / "inputs" / "sources", train=3, test=1, scenes=2)
    write_broken(sources / "footage", sources / "train" / "train_0000.mp4")
    shutil.copy(SAMPLES / "city-night.mpg", sources / "footage")
    return tmp_path / "inputs"


def kill(runs: Runs, process: BaseProcess, who: str, generator: random.Random) -> None:
    """Kill the run, the run with all its workers, or one worker, which the run must survive."""
    workers = [worker.pid for worker in runs.workers(process)]
    one = generator.sample(workers, min(1, len(workers)))
    for pid in {"run": [process.pid], "all": [process.pid, *workers], "worker": one}[who]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def forget_some(work: Path, generator: random.Random) -> None:
    """Leave a finished run's work as that of a run that got to some of the units."""
    shutil.rmtree(work / "finished", ignore_errors=True)
    for unit in sorted((work / "measured").iterdir()):
        if generator.random() < 0.5:
            shutil.rmtree(unit)
            shutil.rmtree(work / "scored" / unit.name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_fifty_times_the_result_is_the_same_byte_for_byte(inputs, tmp_path):
    runs = Runs(inputs, tmp_path / "undisturbed")
    assert runs.finish() == 0
    expected, counts = tree(runs.folder / "output"), list(runs.counts)
    assert min(counts) > 0
    shutil.rmtree(runs.folder / "work")
    started = time.monotonic()
    assert runs.finish() == 0 and tree(runs.folder / "output") == expected
    seconds = time.monotonic() - started

    runs = Runs(inputs, tmp_path / "killed")
    generator, killed, finished = random.Random(0), Counter[str](), 0
    while killed.total() < KILLS:
        # By turns before a file operation of a phase, so that every phase is met, and at a moment in time.
        phase = killed.total() // 2 % len(PHASES)
        if killed.total() % 2:
            process = runs.start()
            process.join(generator.uniform(0, seconds))
            kill(runs, process, generator.choice(["run", "all", "worker"]), generator)
        else:
            process = runs.start((phase, generator.randint(1, counts[phase])))
        process.join()
        if process.exitcode == 0:
            assert tree(runs.folder / "output") == expected
            assert sorted(path.name for path in runs.folder.iterdir()) == [".output.lock", "output", "work"]
            forget_some(runs.folder / "work", generator)
            finished += 1
        else:
            assert process.exitcode == -signal.SIGKILL
            killed[PHASES[runs.now.value] if runs.now.value >= 0 else "starting"] += 1
    assert runs.finish() == 0 and tree(runs.folder / "output") == expected
    assert set(killed) >= set(PHASES) and finished > 0, killed


@pytest.mark.timeout(300)
def test_a_killed_run_leaves_no_worker_behind(inputs, tmp_path):
    runs = Runs(inputs, tmp_path)
    # In its first file operations the run starts its workers; later ones decode and write clips.
    for operation in (10, 30):
        process = runs.start((PHASES.index("measuring"), operation))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        _, left = psutil.wait_procs(runs.processes(), timeout=30)
        assert not left, [p.cmdline() for p in left]
