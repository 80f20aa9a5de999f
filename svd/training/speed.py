"""What a training logs of itself by step beside its losses: speed, use of the device, memory, gradient norm.

All of it is for people and goes to the tracker alone: no weight depends on it, and nothing of it is published. Between
two logged points the host only reads its own clock, the device is never waited for.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache

import psutil
import torch
from torch import Tensor

from svd.config import Phase, Precision, Preset, TrainingCompute, TrainingConfig
from svd.core.errors import UserError
from svd.latents.batches import IndexedLoader
from svd.latents.loader import Batch
from svd.tasks.base import Task
from svd.training.planning.step import Shape, make_batch, trace_step

logger = logging.getLogger(__name__)
GIGA = 1e9
HALF = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}
SMALLEST, LARGEST_ON_CPU = 256, 1024  # rows of the matrices whose product measures the peak
LARGEST = {"cuda": 8192}  # as large as a GPU needs to be busy
PEAK_SECONDS = 0.2


@dataclass(frozen=True)
class StepFacts:
    """The metrics of the steps since the last logged point, by the names under which they are logged.

    samples_per_second: clips or images over all ranks, by the time from fetching a batch to the end of its step;
    validation, previews and checkpoints aren't counted. data_wait_share: 0 to 1, of that time, waiting for the batch.
    memory_gb: 1e9 bytes; on a GPU the most that tensors took since the last point, validation and previews included,
    else what the process holds now (RSS). gradient_norm: mean before clipping, without steps where it was infinite.
    mfu: model FLOPs utilisation, operations of a step without recomputation (arXiv 2204.02311, App. B) over its time
    and the peak. peak_tflops: of one device, measured when the phase began (`measure_peak`), 1e12 operations a second.
    All but samples_per_second are those of the first rank. None: unknown, not logged.
    """

    samples_per_second: float
    data_wait_share: float
    memory_gb: float
    gradient_norm: float | None
    mfu: float | None
    peak_tflops: float | None

    def metrics(self) -> dict[str, float]:
        """Return what is known, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Stopwatch:
    """The seconds in which batches were fetched and trained on, and of these the seconds of waiting for a batch."""

    def __init__(self) -> None:
        self.busy = self.waited = 0.0
        self._began = time.perf_counter()

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches; the time of a step begins when its batch is asked for."""
        while True:
            self._began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - self._began
            if batch is None:
                return
            yield batch

    def stop(self) -> None:
        """End the time of a batch; the next one begins with its fetching."""
        self.busy += time.perf_counter() - self._began

    def reset(self) -> None:
        """Begin at zero."""
        self.busy = self.waited = 0.0


class WatchedLoader:
    """An IndexedLoader whose waiting is measured; batches and state are its own."""

    def __init__(self, loader: IndexedLoader, stopwatch: Stopwatch) -> None:
        self.loader, self.stopwatch = loader, stopwatch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return self.stopwatch.watch(iter(self.loader))

    def state_dict(self) -> dict[str, int]:
        """Return the state of the loader."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the state of the loader."""
        self.loader.load_state_dict(state)


class Meter:
    """Gathers the facts of the steps between two logged points.

    count: given the number of ranks, counts the operations of a batch on one device, by the shape of its latents.
    context_ranks: how many ranks have the same batch.
    """

    def __init__(
        self,
        stopwatch: Stopwatch,
        precision: Precision,
        count: Callable[[int], Mapping[torch.Size, int]],
        context_ranks: int = 1,
    ) -> None:
        self.stopwatch, self.precision, self.count = stopwatch, precision, count
        self.context_ranks = context_ranks
        self.batches = Counter[torch.Size]()
        self.norms: list[Tensor] = []

    def start(self, device: torch.device, ranks: int) -> None:
        """Count the operations of a batch, and measure the device's peak; where that fails, log no utilisation."""
        self.ranks, self.peak = ranks, math.nan
        self.operations: Mapping[torch.Size, int] = {}
        try:
            self.operations, self.peak = self.count(ranks), measure_peak(device, self.precision)
        except (RuntimeError, UserError) as error:  # no memory left, no kernel on `meta`, sizes that can't be planned
            logger.warning("the utilisation of the device isn't known: %s", error)
        take_memory(device)

    def stop(self, latents: torch.Size, gradient_norm: Tensor | None = None) -> None:
        """Count a batch that ends now, and the step that it completes; the norm (None: none) stays on its device.

        latents: shape of this rank's batch, (B, T, C, h, w).
        """
        self.stopwatch.stop()
        self.batches[latents] += 1
        if gradient_norm is not None:
            self.norms.append(gradient_norm)

    def take(self, device: torch.device) -> StepFacts:
        """Return the facts since the last call, and begin anew. The host waits for the device here."""
        seconds = self.stopwatch.busy
        samples = self.ranks // self.context_ranks * sum(shape[0] * count for shape, count in self.batches.items())
        known = self.operations.keys() >= self.batches.keys()
        operations = sum(self.operations[shape] * count for shape, count in self.batches.items()) if known else 0
        norms = torch.stack(self.norms).float()
        finite = norms[torch.isfinite(norms)]
        facts = StepFacts(
            samples_per_second=samples / seconds,
            data_wait_share=self.stopwatch.waited / seconds,
            memory_gb=take_memory(device),
            gradient_norm=finite.mean().item() if len(finite) else None,
            mfu=None if math.isnan(self.peak) or not known else operations / (seconds * self.peak),
            peak_tflops=None if math.isnan(self.peak) else self.peak / 1e12,
        )
        self.norms.clear()
        self.batches.clear()
        self.stopwatch.reset()
        return facts


def make_meter(
    stopwatch: Stopwatch, preset: Preset, task: Task, config: TrainingConfig, phase: Phase, compute: TrainingCompute
) -> Meter:
    """Return the meter of a phase."""
    passes, shared = compute.gradient_accumulation, compute.context_ranks

    def count(ranks: int) -> dict[torch.Size, int]:
        found = {}
        for size in phase.by_bucket:
            clips = size.batch_size // (ranks // shared * passes)
            latents = make_batch(preset, task, size, clips)["latents"].shape
            shape = Shape(clips, context_ranks=shared, gpu=False)
            found[latents] = trace_step(preset, task, config, size, shape).flops
        return found

    return Meter(stopwatch, config.precision, count, shared)


def take_memory(device: torch.device) -> float:
    """Return the GB (1e9 bytes) that tensors took at most since the last call; without a GPU, of the process now."""
    if device.type != "cuda":
        return float(psutil.Process().memory_info().rss) / GIGA
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most / GIGA


@cache
def measure_peak(device: torch.device, precision: Precision) -> float:
    """Return the FLOP/s of the fastest of some products of two square matrices in a training's precision.

    Measured once a process. Matrices in float32 are multiplied as the training does it, without TF32. The global random
    state stays as it is.
    """
    dtype, largest = HALF.get(precision, torch.float32), LARGEST.get(device.type, LARGEST_ON_CPU)
    best, side, until = 0.0, SMALLEST, time.perf_counter() + PEAK_SECONDS
    while True:  # from small ones on: a CPU without float16 takes ten seconds for the largest
        best = max(best, 2 * side**3 / _product_seconds(side, dtype, device))
        if time.perf_counter() > until:
            return best
        side = min(2 * side, largest)


def _product_seconds(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Time a product of matrices (side, side); one before it loads the kernel."""
    draw = torch.Generator(device).manual_seed(0)  # of zeros, a GPU multiplies faster than it ever does in a training
    left, right = (torch.randn(side, side, generator=draw, device=device, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    began = _now(device)
    torch.mm(left, right)
    return _now(device) - began


def _now(device: torch.device) -> float:
    """Return the time when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
