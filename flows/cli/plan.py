"""`svd plan`: what the trainings of a preset need, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from rich.table import Table

from flows.checking.placement import unshared
from flows.cli.options import console, table_console
from flows.stages import STAGES, find_stage
from svd.config import LoraConfig, Preset
from svd.core.errors import UserError
from svd.training.planning.gpus import Gpu
from svd.training.planning.plan import GIB, Assumptions, PhasePlan, plan_training

PARTS = ("weights", "averages", "optimiser", "gradients", "autoencoder", "activations", "exchange")


def print_plan(
    preset: Preset, names: Sequence[str], given: Assumptions, price: float | None = None, as_json: bool = False
) -> None:
    """Print the plan of these trainings (none: all of them); raise UserError when one can't run so.

    price: of a GPU's hour; None: the preset's, if it has one.
    """
    stages = [_training(name) for name in names] or [name for name, stage in STAGES.items() if stage.distributed]
    plans = [plan for name in stages for plan in plan_training(preset, name, given, _runs(preset, name))]
    cost = _price(preset, price)
    if as_json:
        print(json.dumps([_values(plan, given.gpu, cost) for plan in plans], indent=2))
    else:
        _print_tables(plans, given, cost)
    for line in _notes(preset, stages, plans):
        console.print(f"[yellow]note:[/] {line}", highlight=False, soft_wrap=True)
    problems = [line for name in stages for line in unshared(preset, name, given.auto)]
    problems += [misfit for plan in plans if (misfit := plan.misfit(given.gpu))]
    for line in problems[:-1]:
        console.print(f"[red]error:[/] {line}", highlight=False, soft_wrap=True)
    if problems:
        raise UserError(problems[-1])


def _training(name: str) -> str:
    """Return the name of a training; raise UserError for any other stage."""
    if not find_stage(name).distributed:
        known = ", ".join(stage.name for stage in STAGES.values() if stage.distributed)
        raise UserError(f"'{name}' trains no diffusion model; a plan has {known}")
    return name


def _runs(preset: Preset, stage: str) -> int:
    """Return how many models a stage trains, one after the other."""
    if stage == "threshold-calibration":
        from evaluation.calibration.candidates import candidates

        return len({model.name for models in candidates(preset).values() for model in models})
    config = getattr(preset, stage.replace("-", "_"))
    return len(config.motions) if isinstance(config, LoraConfig) else 1


@dataclass(frozen=True)
class _Price:
    """The price of a GPU's hour, and its currency, "" when nobody said."""

    hour: float
    currency: str

    def of(self, plan: PhasePlan) -> float | None:
        """Return what a phase costs; None when its hours aren't known."""
        return None if plan.hours is None else plan.hours * self.hour


def _price(preset: Preset, given: float | None) -> _Price | None:
    """Return the given price, else the preset's, else None."""
    prices = preset.compute.prices
    if given is not None:
        return _Price(given, prices.currency if prices else "")
    return _Price(prices.gpu_hour, prices.currency) if prices and prices.gpu_hour else None


def _values(plan: PhasePlan, gpu: Gpu, price: _Price | None) -> dict[str, Any]:
    """Return a phase as plain values: bytes, operations, hours."""
    return {
        "stage": plan.stage,
        "phase": plan.number + 1,
        "frames": plan.phase.frames,
        "height": plan.phase.height,
        "width": plan.phase.width,
        "buckets": len(plan.phase.buckets),
        "parameters": asdict(plan.parameters) | {"total": plan.parameters.total},
        "memory_bytes": asdict(plan.memory) | {"total": plan.memory.total},
        "fits": None if gpu.memory is None else plan.misfit(gpu) is None,
        "ranks": plan.ranks,
        "passes": plan.passes,
        "clips_per_pass": plan.clips,
        "context_ranks": plan.context_ranks,
        "flops_per_step_and_device": plan.flops,
        "iterations": plan.phase.iterations,
        "samples": plan.samples,
        "runs": plan.runs,
        "gpu_hours": plan.hours,
        "cost": price.of(plan) if price else None,
    }


def _print_tables(plans: Sequence[PhasePlan], given: Assumptions, price: _Price | None) -> None:
    out = table_console()
    for title, rows in (
        ("Parameters of the U-Net, millions", _parameter_rows(plans)),
        ("Memory of one device at the peak of a step, GiB", _memory_rows(plans)),
        (f"Work, and hours on {given.gpu.name} at {given.utilisation:.0%} of its peak", _work_rows(plans, price)),
    ):
        header, *lines = rows
        table = Table(*header, title=title, title_justify="left")
        for column in table.columns[2:]:
            column.justify = "right"
        for line in lines:
            table.add_row(*line)
        out.print(table)


def _parameter_rows(plans: Sequence[PhasePlan]) -> Iterator[Sequence[str]]:
    yield "stage", "phase", "image layers", "temporal layers", "embedding of ids", "learned mask", "total", "trained"
    for plan in plans:
        count = plan.parameters
        numbers = (count.image, count.temporal, count.ids, count.mask, count.total, count.trained)
        yield plan.stage, str(plan.number + 1), *(f"{number / 1e6:,.2f}" for number in numbers)


def _memory_rows(plans: Sequence[PhasePlan]) -> Iterator[Sequence[str]]:
    yield "stage", "phase", *PARTS, "total"
    for plan in plans:
        parts = [getattr(plan.memory, part) for part in (*PARTS, "total")]
        yield plan.stage, str(plan.number + 1), *(f"{size / GIB:.2f}" for size in parts)


def _work_rows(plans: Sequence[PhasePlan], price: _Price | None) -> Iterator[Sequence[str]]:
    cost = [f"cost {price.currency}".strip()] if price else []
    yield (
        "stage",
        "phase",
        "clips",
        "devices x passes x clips",
        "TFLOP/step",
        "steps",
        "samples",
        "runs",
        "GPU hours",
        *cost,
    )
    for plan in plans:
        phase, paid = plan.phase, price.of(plan) if price else None
        money = [("-" if paid is None else f"{paid:,.2f}")] if price else []
        yield (
            plan.stage,
            str(plan.number + 1),
            f"{phase.frames}x{phase.height}x{phase.width}" + (f" + {len(phase.buckets)}" if phase.buckets else ""),
            f"{plan.ranks} x {plan.passes} x {Fraction(plan.clips, plan.context_ranks)}",
            f"{plan.flops / 1e12:,.3g}" if plan.flops < 1e15 else f"{plan.flops / 1e12:,.0f}",
            f"{phase.iterations:,}",
            f"{plan.samples:,}",
            str(plan.runs),
            _hours(plan.hours),
            *money,
        )
    known = [plan.hours for plan in plans if plan.hours is not None]
    if known:
        money = [f"{sum(known) * price.hour:,.2f}"] if price else []
        yield "all", *[""] * 7, _hours(sum(known)), *money


def _hours(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _notes(preset: Preset, stages: Sequence[str], plans: Sequence[PhasePlan]) -> Iterator[str]:
    """Yield what the plan assumes of buckets, and what keeps trainings out of a pipeline: nodes, too many hours."""
    if bucketed := dict.fromkeys(plan.stage for plan in plans if plan.phase.buckets):
        yield (
            "how many clips a bucket has isn't known before the latents are: every step is planned with the memory and "
            f"the work of the largest bucket, samples as if all had the phase's own size: {', '.join(bucketed)}"
        )
    if several := [name for name in stages if preset.compute.of(name).nodes > 1]:
        yield f"several nodes, so not for a pipeline (README, Several GPUs): {', '.join(several)}"
    for name in stages:
        own = [plan.hours / plan.ranks for plan in plans if plan.stage == name and plan.hours is not None]
        if own and sum(own) > (limit := find_stage(name).hours):
            yield f"'{name}' takes about {sum(own):,.0f} h, its flow is stopped after {limit} (flows/stages.py)"
