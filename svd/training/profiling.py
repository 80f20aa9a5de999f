"""A trace of some steps of a training, for `svd stage NAME --profile N`: what ran when, and what costs most."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from svd.core.files import atomic_file
from svd.training.callbacks import Updates

logger = logging.getLogger(__name__)
WAIT, WARMUP = 2, 1  # steps before: allocations and choices of kernels settle, then the profiler's own first ones do
COSTLIEST = 10


class Profiling(Updates):
    """Traces `steps` steps of a phase after three others, or what there is of them when the phase ends earlier.

    Writes `<name>-steps-<first>-<last>.json.gz` into `folder`, a Chrome trace (ui.perfetto.dev opens it), and logs the
    costliest operators. offset: steps of the phases before. What an error or SIGTERM interrupts writes nothing.
    """

    def __init__(self, folder: Path, name: str, steps: int, offset: int) -> None:
        self.folder, self.name, self.steps, self.offset = folder, name, steps, offset
        self.profiler: profile | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Begin to count the steps."""
        super().on_train_start(trainer, module)
        self.first = self.offset + trainer.global_step + WAIT + WARMUP + 1
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
        plan = schedule(wait=WAIT, warmup=WARMUP, active=self.steps, repeat=1)
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it takes a machine without a GPU for an error
        self.profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self.profiler.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End a step of the trace, and begin another one unless it was the phase's last."""
        if self.profiler is not None and self.stepped(trainer) and trainer.global_step != trainer.max_steps:
            self.profiler.step()

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Write a trace that the phase's end cuts short."""
        if self.profiler is not None:
            self.profiler.stop()
        if self.last_step + self.offset < self.first:
            logger.warning("%s: too few steps were left for a trace, which begins after %d", self.name, WAIT + WARMUP)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Drop the trace: after SIGTERM there is no time for it."""
        if self.profiler is not None:
            self.profiler.on_trace_ready = None
            self.profiler.stop()

    def _write(self, profiler: profile) -> None:
        last = min(self.first + self.steps - 1, self.offset + self.last_step)
        path = self.folder / f"{self.name}-steps-{self.first}-{last}.json.gz"
        try:
            with atomic_file(path) as temporary, TemporaryDirectory(dir=path.parent) as folder:
                raw = Path(folder) / path.name  # by the ending it is compressed
                profiler.export_chrome_trace(str(raw))
                raw.replace(temporary)
        except (OSError, RuntimeError) as error:  # a full disk, say; the training matters more
            logger.warning("%s: no trace is written, the training goes on (%s)", path, error)
            return
        logger.warning("%s: trace of steps %d to %d\n%s", path, self.first, last, costliest(profiler))


def costliest(profiler: profile) -> str:
    """Return a table of the operators that took most of the GPU's time, or else the CPU's, without those they call.

    Shares are of all operators; kernels count to the operator that starts them.
    """
    gpu = torch.cuda.is_available()
    rows = [
        (event.key, event.count, (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU and not event.is_user_annotation
    ]
    whole = sum(milliseconds for _, _, milliseconds in rows) or 1.0
    lines = [f"{'operator':60} {'calls':>8} {'ms':>10} {'share':>6}"]
    for key, count, milliseconds in sorted(rows, key=lambda row: -row[2])[:COSTLIEST]:
        lines.append(f"{key[:60]:60} {count:8} {milliseconds:10.2f} {milliseconds / whole:6.1%}")
    return "\n".join(lines)
