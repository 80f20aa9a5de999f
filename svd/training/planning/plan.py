"""The plan of a training: each phase's parameters, memory, work, samples and hours, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from svd.config import Phase, Preset, TrainingCompute, TrainingConfig
from svd.model.unet import UNet
from svd.tasks.registry import task_of_stage
from svd.tasks.text_to_video import IMAGE
from svd.training.module import TEMPORAL_PARTS
from svd.training.planning.gpus import RESERVE, UTILISATION, Gpu
from svd.training.planning.memory import Memory, measure_memory
from svd.training.planning.step import Shape, trace_step

GIB = 2**30
HOUR = 3600


@dataclass(frozen=True)
class Parameters:
    """How many numbers the U-Net has: its image layers, temporal layers, the embedding of ids; and what of it trains.

    An adapter (LoRA) counts to the temporal layers, where it is. mask: the learned mask embedding of interpolation.
    """

    image: int
    temporal: int
    ids: int
    mask: int
    trained: int

    @property
    def total(self) -> int:
        """Return the size of the U-Net."""
        return self.image + self.temporal + self.ids + self.mask


@dataclass(frozen=True)
class PhasePlan:
    """What one phase of a training needs.

    runs: how often it is trained (a LoRA a motion, a model a candidate of the calibration). ranks, passes, clips: each
    of so many devices makes so many forward passes a step, with so many clips, each of which `context_ranks` devices
    share. flops: operations of one step on one device, recomputation included; with buckets of the largest, as the
    memory is. hours: of all GPUs and runs together; None when the GPU's peak is unknown.
    """

    stage: str
    number: int
    phase: Phase
    parameters: Parameters
    memory: Memory
    ranks: int
    passes: int
    clips: int
    context_ranks: int
    flops: int
    runs: int
    hours: float | None

    @property
    def samples(self) -> int:
        """Return how many clips or images a run sees, with buckets if all had the phase's own size."""
        return self.phase.iterations * self.phase.batch_size

    @property
    def gibibytes(self) -> float:
        """Return the memory of one device, GiB."""
        return self.memory.total / GIB

    def misfit(self, gpu: Gpu) -> str | None:
        """Say that the phase needs more memory than the GPU has, and what would help; None when it fits."""
        if gpu.memory is None or self.gibibytes + RESERVE <= gpu.memory:
            return None
        section = f"compute.{self.stage.replace('-', '_')}"
        return (
            f"{self.stage}, phase {self.number + 1}: needs {self.gibibytes:.1f} GiB and {RESERVE:g} for CUDA, of "
            f"{gpu.memory:g} on {gpu.name}; set {section}.checkpointing: all, a higher gradient_accumulation, "
            "strategy: fsdp2 or context_ranks over more devices, or take a larger GPU"
        )


def count_parameters(unet: UNet) -> Parameters:
    """Count the parameters of a U-Net by part."""
    parts = dict.fromkeys(("image", "temporal", "ids", "mask"), 0)
    for name, parameter in unet.named_parameters():
        temporal = any(word in name for word in TEMPORAL_PARTS)
        part = "ids" if name.startswith("add_embedding") else "mask" if name == "mask_latent" else "image"
        parts["temporal" if temporal else part] += parameter.numel()
    return Parameters(**parts, trained=sum(p.numel() for p in unet.parameters() if p.requires_grad))


def ranks_of(compute: TrainingCompute, auto: int) -> int:
    """Return how many processes train together; `auto` is what `devices: auto` stands for on each node."""
    return compute.nodes * (auto if compute.devices == "auto" else compute.devices)


@dataclass(frozen=True)
class Assumptions:
    """What a plan is made for: the GPU, the share of its peak that is reached, devices a node where none are said."""

    gpu: Gpu
    utilisation: float = UTILISATION
    auto: int = 1


def plan_training(preset: Preset, stage: str, given: Assumptions, runs: int = 1) -> list[PhasePlan]:
    """Plan the phases of a training stage, which trains `runs` models one after the other.

    A batch that its ranks can't share evenly is planned as the next larger one that they can, and a clip of fewer
    frames than should share it as if it had none but those. How many clips a bucket has is known only when the latents
    are: every step is planned as one of the bucket that computes most.
    """
    task = IMAGE if stage in IMAGE.stages else task_of_stage(stage)
    config: TrainingConfig = getattr(preset, stage.replace("-", "_"))
    compute, found = preset.compute.of(stage), []
    ranks, parts = ranks_of(compute, given.auto), compute.gradient_accumulation
    sharded, peak = compute.strategy == "fsdp2", given.gpu.peak(config.precision)
    for number, phase in enumerate(config.phases):
        shared = min(compute.context_ranks, *(size.frames for size in phase.by_bucket))
        groups, steps = max(1, ranks // shared), []
        for size in phase.by_bucket:
            clips = -(-size.batch_size // (groups * parts))
            shape = Shape(clips, shared, parts > 1, compute.checkpointing, sharded, given.gpu.name != "cpu")
            steps.append(trace_step(preset, task, config, size, shape))
        clips, flops = -(-phase.batch_size // (groups * parts)), max(step.flops for step in steps) * parts
        seconds = None if peak is None else phase.iterations * flops / (peak * 1e12 * given.utilisation)
        hours = None if seconds is None else runs * ranks * seconds / HOUR
        memory = max((measure_memory(step, config, ranks, sharded) for step in steps), key=lambda memory: memory.total)
        counted = count_parameters(steps[0].network)
        found.append(PhasePlan(stage, number, phase, counted, memory, ranks, parts, clips, shared, flops, runs, hours))
    return found
