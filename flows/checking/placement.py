"""What of a preset's trainings no pipeline could place, found before its first stage runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flows.stages import find_stage
from svd.config import Preset
from svd.core.errors import UserError
from svd.training.shares import unshareable


def misplaced(preset: Preset, names: Sequence[str], gpus: int | None = None) -> Iterator[str]:
    """Yield a line for each training that wants what a flow's one machine doesn't have, or that can't share its batch.

    gpus: of the machine that runs the stages, when it is known and has any. What a cluster's nodes have isn't known
    here; a pod that no node takes says so in its run's state.
    """
    for name in (name for name in names if find_stage(name).distributed):
        compute = preset.compute.of(name)
        if compute.nodes > 1:
            yield (
                f"compute: stage '{name}' wants {compute.nodes} nodes, but a flow gives each stage one machine; set "
                f"`nodes: 1` or run `svd stage {name}` on every node with srun or torchrun first "
                "(README, Several GPUs)"
            )
        elif compute.devices != "auto" and gpus is not None and compute.devices > gpus:
            yield f"compute: stage '{name}' wants {compute.devices} devices, this machine has {gpus}; set `devices`"
        yield from unshared(preset, name, gpus)


def unshared(preset: Preset, name: str, gpus: int | None = None) -> Iterator[str]:
    """Yield a line for each phase of a training whose clips its ranks and accumulation steps can't share.

    gpus: what `devices: auto` stands for; without it such a training is one process.
    """
    compute = preset.compute.of(name)
    ranks = compute.nodes * ((gpus or 1) if compute.devices == "auto" else compute.devices)
    section = name.replace("-", "_")
    for number, phase in enumerate(getattr(preset, section).phases):
        if problem := unshareable(phase, compute, ranks):
            yield f"{section}.phases.{number}: {problem}"


def refuse_misplaced(preset: Preset, names: Sequence[str], gpus: int | None = None) -> None:
    """Raise UserError with the first line of `misplaced`, if there is one."""
    for line in misplaced(preset, names, gpus):
        raise UserError(line)


def gpus_here() -> int | None:
    """Return how many GPUs torch sees on this machine; None without any, where processes share the CPU."""
    import torch

    return torch.cuda.device_count() or None
