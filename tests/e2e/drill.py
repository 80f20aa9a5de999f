"""Faults on the real local stack, one after the other: `make drill` prints for each what became of the work.

Lost: the pipeline did not end Completed, or finished work was done again. Doubled: a stage ended twice, or MLflow has
two runs of it or two values of a step. `python tests/e2e/drill.py NAME…` runs some of the faults alone.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest does

import mlflow
from stack_project import FINAL, StackProject, running

STEPS = 150
PRESET = "drill"
HANG_SECONDS = 60
PATIENCE = 900  # seconds for anything, on a machine that has much else to do


class Lost(Exception):
    """Finished work was done again, or the pipeline did not end well."""


class Doubled(Exception):
    """Something was done or told twice."""


class Drill:
    """The stack, and one pipeline after the other on it."""

    def __init__(self, folder: Path) -> None:
        self.project = StackProject(folder / "clone")
        self.project.preset(PRESET, encoders__toy_iterations=STEPS)
        self.project.select(PRESET)
        self.run = ""
        self.since = 0.0

    def stack(self) -> AbstractContextManager[StackProject]:
        """The stack, up."""
        return running(self.project)

    def start(self, *stages: str, force: bool = True) -> None:
        """Start a pipeline of these stages, of those that are up to date as well if `force`."""
        self.since = time.time()
        names = ",".join(f'"{stage}"' for stage in stages)
        self.run = self.project.start_pipeline(f"stages=[{names}]", f"force={str(force).lower()}")

    def child(self, stage: str) -> dict[str, Any]:
        """The running child of the pipeline for `stage`."""

        def find() -> dict[str, Any] | None:
            found = [c for c in self.project.children(self.run) if c["name"].startswith(stage)]
            return found[-1] if found and found[-1]["state_type"] == "RUNNING" else None

        return dict(self.wait_until(find))

    def wait_until(self, what: Callable[[], Any]) -> Any:
        """What `what` returns once that is true; raises Lost when the pipeline ends before."""

        def check() -> Any:
            if found := what():
                return found
            if (state := self.project.flow_run(self.run))["state_type"] in FINAL:
                raise Lost(f"the pipeline ended {state['state_name']}: {state['state']['message']}")
            return None

        return self.project.wait_until(check, PATIENCE)

    def train(self) -> dict[str, Any]:
        """Start a training; its child, once it wrote a checkpoint and logged a loss."""
        self.start("encoders")
        child = self.child("encoders")
        work, spool = self.project.folder / "work" / PRESET / "encoders", self.project.folder / "work" / "tracking"
        journal = self.wait_until(lambda: next(spool.glob("encoders*/journal.jsonl"), None))
        self.wait_until(lambda: any(work.glob("*/*.pt")) and '"loss"' in journal.read_text())
        return child

    def units(self) -> dict[str, int]:
        """The finished units of the curation in progress, by path, with their inodes."""
        found = (self.project.folder / "work" / PRESET).glob("curation/*/scored/[!.]*")
        return {str(path): path.stat().st_ino for path in found}

    def flow_output(self) -> str:
        """What all flow runs printed so far."""
        log = self.project.folder / ".local" / "log" / "flows.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def check_resumed(self, before: int) -> None:
        """Check that a training that printed `before` characters until its death went on behind its first step."""
        said = self.flow_output()[before:]
        found = re.search(rf"train toy-clip: .*?(\d+)/{STEPS}", said)
        if found is None:
            raise Lost("nobody went on with the training")
        if int(found[1]) == 0:
            raise Lost("the training began anew")

    def judge(self) -> None:
        """Wait for the pipeline; raises Lost or Doubled."""
        ended = self.project.wait(self.run, PATIENCE)
        if ended["state_type"] != "COMPLETED":
            raise Lost(f"the pipeline ended {ended['state_name']}: {ended['state']['message']}")
        children = self.project.children(self.run)
        twice = [n for n, k in Counter(c["name"] for c in children if c["state_type"] == "COMPLETED").items() if k > 1]
        if twice:
            raise Doubled(f"{', '.join(twice)} ended twice")
        self.project.run("svd", "track", "flush")
        self._judge_tracking({c["name"].removesuffix(f"-{PRESET}") for c in children} | {"full-pipeline"})

    def _judge_tracking(self, stages: set[str]) -> None:
        client = mlflow.MlflowClient(f"http://127.0.0.1:{self.project.ports['mlflow']}")
        experiment = client.get_experiment_by_name("stable-video-diffusion").experiment_id
        runs = client.search_runs([experiment], f"attributes.start_time > {int(self.since * 1000)}")
        told = Counter(run.data.tags.get("stage") for run in runs)
        if missing := stages - set(told) | {r.data.tags["stage"] for r in runs if r.info.status != "FINISHED"}:
            raise Lost(f"MLflow has no finished run of {', '.join(sorted(missing))}")
        if twice := [stage for stage, count in told.items() if count > 1]:
            raise Doubled(f"MLflow has two runs of {', '.join(map(str, twice))}")
        for run in runs:
            for metric in run.data.metrics:
                steps = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
                if len(steps) != len(set(steps)):
                    raise Doubled(f"MLflow has steps of {metric} twice")
                if metric == "loss" and steps != list(range(STEPS)):
                    raise Lost(f"MLflow has {len(steps)} of {STEPS} steps of the training")


def worker_cpu_pending(drill: Drill) -> None:
    """The worker of the parent dies while the parent is Pending."""
    drill.start("encoders")
    drill.wait_until(lambda: drill.project.flow_run(drill.run)["state_type"] != "SCHEDULED")
    state = drill.project.flow_run(drill.run)["state_type"]
    drill.project.kill("worker-cpu")
    if state != "PENDING":
        raise Lost(f"the drill was too slow, the pipeline was {state}")
    drill.project.up()


def worker_cpu_running(drill: Drill) -> None:
    """The worker dies alone; the parent that it started lives on."""
    drill.train()
    drill.project.kill_alone("worker-cpu")
    time.sleep(10)
    drill.project.up()


def worker_gpu(drill: Drill) -> None:
    """The worker dies with its stage."""
    drill.train()
    drill.project.kill("worker-gpu")
    before = len(drill.flow_output())
    drill.project.up()
    drill.judge()
    drill.check_resumed(before)


def stage_in_curation(drill: Drill) -> None:
    """The process of the curation is killed between two units."""
    drill.start("sources", "encoders", "curation", force=False)
    child = drill.child("curation")
    drill.wait_until(lambda: len(drill.units()) >= 2)
    drill.project.kill_run(child["id"])
    done = drill.units()
    drill.wait_until(lambda: len(drill.units()) > len(done))
    if not drill.units().items() >= done.items():
        raise Lost("a finished unit was made again")


def stage_in_training(drill: Drill) -> None:
    """The process of a training is killed."""
    child = drill.train()
    drill.project.kill_run(child["id"])
    before = len(drill.flow_output())
    drill.judge()
    drill.check_resumed(before)


def stage_publishing(drill: Drill) -> None:
    """The process of a stage is killed when it is about to rename its output into place."""
    before = len(drill.flow_output())
    drill.project.die_once_renaming(f"outputs/{PRESET}/encoders")
    drill.train()
    drill.judge()
    if len(drill.project.children(drill.run)) < 2:
        raise Lost("nobody was killed")
    if drill.flow_output()[before:].count(f"0/{STEPS} [00:00<?") > 1:
        raise Lost("the training began anew")


def prefect_server(drill: Drill) -> None:
    """Prefect's server is killed, its child as well."""
    drill.train()
    drill.project.kill("prefect")
    time.sleep(5)
    drill.project.up()


def mlflow_parent(drill: Drill) -> None:
    """MLflow's parent is killed, its child keeps the port."""
    drill.train()
    drill.project.kill_alone("mlflow")
    drill.project.up()


def s3_server(drill: Drill) -> None:
    """S3 is killed."""
    drill.train()
    drill.project.kill("s3")
    time.sleep(10)
    drill.project.up()


def s3_hangs(drill: Drill) -> None:
    """S3 accepts connections and does not answer for a minute."""
    drill.train()
    drill.project.hang("s3", HANG_SECONDS)


def mlflow_hangs(drill: Drill) -> None:
    """MLflow accepts connections and does not answer for a minute."""
    drill.train()
    drill.project.hang("mlflow", HANG_SECONDS)


def down_and_up(drill: Drill) -> None:
    """The whole stack is stopped in the middle and started again."""
    drill.train()
    drill.project.run("svd", "stack", "down")
    before = len(drill.flow_output())
    drill.project.up()
    drill.judge()
    drill.check_resumed(before)


@dataclass(frozen=True)
class Outcome:
    """What became of the work under a fault."""

    fault: str
    seen: str
    why: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.fault:<20} {self.seen:<9} {self.seconds:5.0f} s  {self.why}".rstrip()


FAULTS: dict[str, Callable[[Drill], None]] = {
    fault.__name__.replace("_", "-"): fault
    for fault in (
        stage_in_training, stage_publishing, stage_in_curation, worker_cpu_pending, worker_cpu_running, worker_gpu,
        prefect_server, mlflow_parent, s3_server, s3_hangs, mlflow_hangs, down_and_up,
    )
}  # fmt: skip


def suffer(drill: Drill, name: str) -> Outcome:
    """Let the stack suffer one fault under a pipeline of its own; say what became of it."""
    start = time.monotonic()
    seen, why = "survived", ""
    try:
        FAULTS[name](drill)
        drill.judge()
    except Doubled as error:
        seen, why = "doubled", str(error)
    except (Lost, AssertionError) as error:
        seen, why = "lost", str(error).strip().partition("\n")[0]
    return Outcome(name, seen, why, time.monotonic() - start)


def main(names: list[str]) -> int:
    """Run the faults called `names`, or all; returns how many were not survived."""
    if unknown := [name for name in names if name not in FAULTS]:
        sys.exit(f"no such fault: {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    chosen, bad = names or list(FAULTS), 0
    with tempfile.TemporaryDirectory(prefix="svd-drill-") as folder:
        drill = Drill(Path(folder))
        print("starting the stack", flush=True)
        with drill.stack():
            for number, name in enumerate(chosen, 1):
                print(f"{number}/{len(chosen)} {name}: {FAULTS[name].__doc__}", flush=True)
                outcome = suffer(drill, name)
                print(f"    {outcome}", flush=True)
                bad += outcome.seen != "survived"
    print(f"{len(chosen) - bad} of {len(chosen)} survived")
    return bad


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
