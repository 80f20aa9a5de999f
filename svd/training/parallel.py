"""Devices, precision and sharding: checkpoint, then compile each block, then shard each block (torchtitan's order).

Weights are sharded and gradients averaged over all ranks, whether or not neighbours share their clips.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed import get_rank, new_subgroups
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from svd.config import Precision, TrainingCompute
from svd.model.split import Split
from svd.model.unet import UNet


def strategy(compute: TrainingCompute) -> str | Strategy:
    """Return Lightning's strategy: a single process, DDP, or FSDP2 with checkpoints sharded by rank."""
    if compute.strategy == "fsdp2":
        ranks = compute.nodes * (max(1, torch.cuda.device_count()) if compute.devices == "auto" else compute.devices)
        # Lightning's "auto" shards across nodes only.
        return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=True)
    return compute.strategy


@cache
def split_clips(context_ranks: int) -> Split:
    """Return this rank's place among the neighbours that share its clips; all ranks of the training must call it.

    Made once a process: the groups outlive a phase, as the ranks do.
    """
    if context_ranks == 1:
        return Split()
    group, _ = new_subgroups(context_ranks)
    return Split(get_rank(group), context_ranks, group)


def parallelise(
    unet: UNet, compiled: bool, precision: Precision, mesh: DeviceMesh | None, context_ranks: int = 1
) -> None:
    """Split clips, compile and shard `unet` in place; recomputation is part of the model (`UNetConfig.checkpointing`).

    In mixed precision the shards travel in bf16 and gradients are reduced in float32. Inputs are left to autocast:
    cast to bf16, the noise level would lose the digits that tell neighbouring levels apart.
    """
    unet.split = split_clips(context_ranks)
    if compiled:
        unet.compile_blocks()
    if mesh is None:
        return
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh["data_parallel"], "mp_policy": policy}
    for block in unet.blocks():
        fully_shard(block, **options)
    fully_shard(unet, **options)
    # It reads the learned mask, which the root gathers only in its forward methods.
    register_fsdp_forward_method(unet, "interpolation_channels")


def first_rank() -> bool:
    """Return whether this process is the one that writes."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Copy the whole state of a sharded or plain module to the CPU of the first rank.

    Every rank must call it, because the shards are gathered; all but the first get an empty dictionary.
    """
    state = {}
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first_rank():
            # A copy on the CPU too: the module's memory soon holds other values (`Ema.swapped`).
            state[name] = whole.detach().to("cpu", copy=True)
    return state
