"""From a task's signals to denoised latents: the steps that all four tasks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from svd.config import Sampling
from svd.core.errors import UserError
from svd.diffusion.denoising import denoise_latents
from svd.diffusion.guidance import on_device
from svd.generation.models import Models
from svd.tasks.base import Task
from svd.tasks.signals import ClipSignals, dropped

_LARGEST_SEED = 2**63 - 1


def clip_generators(seed: int | Sequence[int], clips: int) -> list[torch.Generator]:
    """Return a CPU generator for each clip: seeds as given, or seed, seed + 1, …

    Raises UserError for a wrong number of seeds and for one outside 0 … 2^63 - 1.
    """
    seeds = [seed + i for i in range(clips)] if isinstance(seed, int) else list(seed)
    if len(seeds) != clips:
        raise UserError(f"{len(seeds)} seeds for {clips} clips; give one for all or one each")
    if any(not 0 <= value <= _LARGEST_SEED for value in seeds):
        raise UserError(f"seeds must lie between 0 and 2^63 - 1, got {seeds}")
    return [torch.Generator().manual_seed(value) for value in seeds]


def generate_latents(
    models: Models,
    task: Task,
    signals: ClipSignals,
    noise: Tensor,
    scale: Tensor,
    sampling: Sampling,
    *,
    null_text: Tensor | None = None,
    progress: bool = True,
) -> Tensor:
    """Return scaled latents (B, T, C, h, w), float32 on the device, from unit noise of this shape.

    scale: (T,) the guidance of each frame. null_text: the empty prompt's embedding, for tasks with a text.
    """
    cond = task.build(signals, models.unet)
    uncond = task.build(dropped(signals, null_text), models.unet)
    with (
        models.working(models.unet) as unet,
        tqdm(total=sampling.steps, desc="denoise", unit="step", disable=not progress) as bar,
    ):
        return denoise_latents(
            unet,
            noise.to(models.device),
            on_device(cond, models.device),
            on_device(uncond, models.device),
            scale.to(models.device),
            sampling,
            models.kind,
            models.passes,
            lambda done, steps: bar.update(),
        )
