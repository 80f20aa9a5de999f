"""A training stops at the first step whose loss or gradient isn't finite, before the optimiser takes it.

Its last checkpoint then holds finite weights alone. The message names the samples, which are written beside it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from svd.core.errors import UserError
from svd.core.finite import not_finite
from svd.latents.batches import Buckets
from svd.latents.loader import Examples


class NotFinite(Exception):
    """The loss or the gradient of a step is NaN or infinite.

    indices: the global samples of this rank whose loss is; empty when it is the gradient alone, or another rank's loss.
    """

    def __init__(self, indices: list[int]) -> None:
        super().__init__(f"samples {indices}" if indices else "the gradient")
        self.indices = indices


def check_step(losses: Tensor, indices: Tensor, gradient_norm: Tensor | None) -> None:
    """Raise NotFinite unless the losses (B,) of the samples `indices` (B,) and the norm () are finite.

    The host waits for the device here once a step. gradient_norm: None where infinite gradients are usual, because a
    scaler for float16 skips such steps.
    """
    finite = torch.isfinite(losses)
    fine = finite.all() if gradient_norm is None else finite.all() & torch.isfinite(gradient_norm)
    if not fine:
        raise NotFinite(indices[~finite].tolist())


def explain(error: NotFinite, examples: Examples | Buckets, step: int, folder: Path) -> UserError:
    """Return the message for people; write the samples into `folder` as `not-finite-<index>.safetensors`."""
    where = f"{folder}: training stopped at step {step}"
    kept = "the last checkpoint is from before"
    if not error.indices:
        return UserError(f"{where}: the gradient is NaN or infinite; lower 'learning_rate' or set 'clip_norm'; {kept}")
    said = [_describe(examples, index, folder) for index in error.indices[:4]]
    return UserError(f"{where}: the loss is NaN or infinite for {'; for '.join(said)}; {kept}")


def _describe(examples: Examples | Buckets, index: int, folder: Path) -> str:
    rows, example = examples.sources(index), examples[index]
    save_file({name: value.contiguous() for name, value in example.items()}, folder / f"not-finite-{index}.safetensors")
    clips = [f"clip {row['clip_id']}, row {row['row']} of shards/{row['shard']}" for row in rows]
    sample = f"sample {index} ({' or '.join(dict.fromkeys(clips))})"
    if bad := not_finite(example):
        held = f"whose {' and '.join(bad)} hold NaN or infinity"
        return f"{sample}, {held}: delete the shard and run the stage 'latents' again"
    return f"{sample}, whose data is finite: lower 'learning_rate', or set 'clip_norm'"
