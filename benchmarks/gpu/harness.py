"""Timing, peak memory and rows of results for the accelerator benchmark."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Machine:
    """Where and how to run. `toy` makes every size small enough for a CPU; `backend` compiles.

    without: variants that are left out, "diffusers, compiled" say, which takes minutes to build.
    """

    device: torch.device
    dtype: torch.dtype
    toy: bool
    repeats: int
    without: Collection[str] = ()

    @property
    def backend(self) -> str:
        """A toy run is about the script, not about generated code, which takes minutes to build on a CPU."""
        return "eager" if self.toy else "inductor"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def failure(error: Exception) -> str:
    """An error in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


@cache
def peer() -> Any | None:
    """diffusers, or None, said once, where it is not installed or does not import."""
    try:
        import diffusers

        # Imported when they are asked for.
        _ = diffusers.UNetSpatioTemporalConditionModel, diffusers.AutoencoderKLTemporalDecoder
    except Exception as error:  # a version that does not fit the rest fails with anything
        print(f"no diffusers here, its rows are left out ({failure(error)})", flush=True)
        return None
    return diffusers


@dataclass(frozen=True)
class Row:
    """One measurement. `teraflops` is the counted work of one run in 1e12 operations."""

    section: str
    case: str
    variant: str
    milliseconds: float | None = None
    teraflops: float | None = None
    peak_gib: float | None = None
    note: str = ""

    def line(self) -> str:
        """The row as text, with the rate of work."""
        time_text = "-" if self.milliseconds is None else f"{self.milliseconds:.2f} ms"
        rate = ""
        if self.milliseconds and self.teraflops:
            rate = f"{self.teraflops / self.milliseconds * 1e3:.1f} TFLOP/s"
        memory = "" if self.peak_gib is None else f"{self.peak_gib:.2f} GiB"
        return (
            f"{self.section:9} {self.case:34} {self.variant:34} {time_text:>14} {rate:>15} {memory:>11} {self.note}"
        ).rstrip()


@dataclass
class Results:
    """All rows so far; every row is printed when it is known."""

    machine: Machine
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Keep and print a row."""
        self.rows.append(row)
        print(row.line(), flush=True)

    def measure(
        self,
        section: str,
        case: str,
        variant: str,
        work: Callable[[], Any],
        teraflops: float | None = None,
        warm_up: Callable[[], Any] | None = None,
    ) -> None:
        """Time `work` and add a row; an error of the device or compiler becomes its note, and the run goes on.

        warm_up: what runs first, untimed; `work` itself by default.
        """
        cuda = self.machine.device.type == "cuda"
        try:
            milliseconds, peak = self._run(work, warm_up or work)
            self.add(Row(section, case, variant, milliseconds, teraflops, peak if cuda else None))
        except Exception as error:  # compilers of versions yet unseen fail with anything
            self.add(Row(section, case, variant, note=failure(error)))
        finally:
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()

    def distance(
        self, section: str, case: str, variant: str, got: Callable[[], Tensor], expected: Callable[[], Tensor]
    ) -> None:
        """A row with the largest difference between two ways to compute the same; errors as in `measure`."""
        try:
            note = f"largest difference {(got().float() - expected().float()).abs().max().item():.1e}"
        except Exception as error:
            note = failure(error)
        self.add(Row(section, case, variant, note=note))

    def _run(self, work: Callable[[], Any], warm_up: Callable[[], Any]) -> tuple[float, float]:
        """Median milliseconds of the repeats after the warm-up, which compiles, and peak memory in GiB."""
        warm_up()
        cuda = self.machine.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.machine.repeats):
            self.machine.synchronize()
            start = time.perf_counter()
            work()
            self.machine.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times), torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0

    def ratio(self, section: str, case: str, slow: str, fast: str, goal: float | None = None) -> None:
        """Print how many times faster one variant is than another, when both were measured at full size."""
        if self.machine.toy:
            return
        found = {row.variant: row.milliseconds for row in self.rows if (row.section, row.case) == (section, case)}
        a, b = found.get(slow), found.get(fast)
        if a and b:
            wanted = "" if goal is None else f" (goal {goal}x)"
            print(f"{'':9} {case:34} {fast} is {a / b:.2f}x as fast as {slow}{wanted}", flush=True)

    def as_json(self) -> list[dict[str, Any]]:
        """Rows as plain values."""
        return [asdict(row) for row in self.rows]
