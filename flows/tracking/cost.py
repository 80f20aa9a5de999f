"""What a run costs: CPU time of its process and of that one's children, and GPUs times wall time, over all attempts.

A stage's figures lie in its work folder, so a run that was killed goes on counting wherever its work goes on. They are
saved every half minute: a kill loses no more than that.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from flows.stages import Stage
from flows.tracking.runs import MlflowTracker
from svd.config import Preset
from svd.config.compute import Prices
from svd.core.files import write_json

COST = "cost.json"
SAVE_SECONDS = 30.0
HOUR = 3600
CURRENCY_TAG = "cost.currency"


@dataclass(frozen=True)
class Cost:
    """Seconds of CPU and GPU over all attempts of a run, and the number of attempts."""

    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    attempts: int = 0

    def metrics(self, prices: Prices | None) -> dict[str, float]:
        """Return the hours by the names of their metrics, and with prices the total in their currency."""
        found = {"cost/cpu_hours": self.cpu_seconds / HOUR, "cost/gpu_hours": self.gpu_seconds / HOUR}
        return found | _total(found, prices)


def _total(hours: Mapping[str, float], prices: Prices | None) -> dict[str, float]:
    if prices is None:
        return {}
    return {"cost/total": hours["cost/cpu_hours"] * prices.cpu_hour + hours["cost/gpu_hours"] * prices.gpu_hour}


def read_cost(work: Path) -> Cost:
    """Return what the run that works, or worked, in `work` has cost so far."""
    try:
        return Cost(**json.loads((work / COST).read_text()))
    except FileNotFoundError:
        return Cost()


def cpu_seconds() -> float:
    """Return the CPU time of this process and its descendants, those that have ended included."""
    total, me = 0.0, psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # its parent has its time now
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def gpus(stage: Stage, preset: Preset) -> int:
    """Return how many GPUs the stage occupies now, over all nodes; 0 on machines without and for work on the CPU."""
    torch = sys.modules.get("torch")  # a stage without networks doesn't import it, and need not
    if torch is None or not torch.cuda.is_available():
        return 0
    if not stage.distributed:
        return int(stage.pool == "gpu" or torch.cuda.is_initialized())
    compute = preset.compute.of(stage.name)
    return compute.nodes * (torch.cuda.device_count() if compute.devices == "auto" else compute.devices)


class Meter:
    """The counter of one attempt on top of what `work` has from earlier ones."""

    def __init__(self, work: Path, count_gpus: Callable[[], int]) -> None:
        self._work, self._count_gpus = work, count_gpus
        self._before = read_cost(work)
        self._start, self._then = cpu_seconds(), time.monotonic()
        self._gpu_seconds = 0.0

    def save(self) -> Cost:
        """Write the figures up to now to the work folder, and return them."""
        now = time.monotonic()
        self._gpu_seconds += (now - self._then) * self._count_gpus()
        self._then = now
        before, spent = self._before, cpu_seconds() - self._start
        cost = Cost(before.cpu_seconds + max(0.0, spent), before.gpu_seconds + self._gpu_seconds, before.attempts + 1)
        write_json(self._work / COST, asdict(cost))
        return cost


@contextmanager
def metered(tracker: MlflowTracker, stage: Stage, preset: Preset, work: Path) -> Iterator[None]:
    """Measure what the block costs; however it ends, log the sum over all attempts to the stage's run."""
    meter, ended = Meter(work, lambda: gpus(stage, preset)), threading.Event()

    def keep_saving() -> None:
        while not ended.wait(SAVE_SECONDS):
            meter.save()

    thread = threading.Thread(target=keep_saving, name="cost", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        cost, prices = meter.save(), preset.compute.prices
        tracker.log_metrics(cost.metrics(prices), step=cost.attempts - 1)
        _log_currency(tracker, prices)


def _log_currency(tracker: MlflowTracker, prices: Prices | None) -> None:
    if prices is not None:
        tracker.log_tags({CURRENCY_TAG: prices.currency})


def log_pipeline_cost(tracker: MlflowTracker, stage: str, cost: Mapping[str, float], prices: Prices | None) -> None:
    """Log a stage's cost to its pipeline's run, and the sum over the stages that this pipeline has run.

    cost: a `Cost` as a dictionary. A second time, by a pipeline that was killed in between, counts once. What the
    pipeline has run before on another machine is in MLflow alone, so the sum is made there, at delivery.
    """
    spent = Cost(cpu_seconds=cost["cpu_seconds"], gpu_seconds=cost["gpu_seconds"])
    hours = {name.removeprefix("cost/"): value for name, value in spent.metrics(None).items()}
    per_hour = None if prices is None else {"cpu_hours": prices.cpu_hour, "gpu_hours": prices.gpu_hour}
    tracker.log_cost(stage, hours, per_hour)
    _log_currency(tracker, prices)
