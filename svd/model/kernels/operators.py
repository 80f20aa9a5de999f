"""The operators for which there are kernels of our own: used on a GPU with Triton and a C compiler.

Everywhere else torch's operators run. The kernels are registered with torch, with gradients, so that compilation,
checkpointing and sharding take them as they take others.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _can_build() -> bool:
    """Return whether Triton is there and can build its launchers, C programs that include Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_paths(scheme="posix_prefix")["include"], "Python.h")
    return importlib.util.find_spec("triton") is not None and bool(compiler) and headers.is_file()


TRITON = _can_build()
TYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_FRAMES = 64  # of a tile of attention


def fits(x: Tensor) -> bool:
    """Return whether our kernels run on this tensor."""
    return TRITON and x.is_cuda and x.dtype in TYPES


def norm(layer: nn.GroupNorm, x: Tensor, *, silu: bool = False) -> Tensor:
    """Apply GroupNorm, then SiLU if asked, to tokens (n, a, b, C), over a, b and the channels of a group.

    The result is contiguous. Statistics in float32 or wider.
    """
    if fits(x):
        return group_norm(x.contiguous(), layer.weight, layer.bias, layer.num_groups, layer.eps, silu)[0]
    # The kernels accumulate half precision in float32.
    y = F.group_norm(x.permute(0, 3, 1, 2), layer.num_groups, layer.weight, layer.bias, layer.eps)
    y = y.permute(0, 2, 3, 1).contiguous()
    return F.silu(y) if silu else y


def norm_images(layer: nn.GroupNorm, x: Tensor, *, silu: bool = False) -> Tensor:
    """Do as `norm` on (n, C, a, b) in channels-last memory."""
    if fits(x):
        return norm(layer, x.permute(0, 2, 3, 1), silu=silu).permute(0, 3, 1, 2)
    y = layer(x)
    return F.silu(y) if silu else y


def can_attend_frames(q_BTSC: Tensor, heads: int) -> bool:
    """Return whether `attend_frames` computes attention over frames: without gradients, in half precision."""
    width = q_BTSC.shape[-1] // heads
    return (
        fits(q_BTSC)
        and not torch.is_grad_enabled()
        and q_BTSC.dtype != torch.float32
        and q_BTSC.shape[1] <= MAX_FRAMES
        and width in (16, 32, 64, 128)
    )


def gated_gelu(x: Tensor) -> Tensor:
    """Return value · GELU(gate) of the halves of (..., 2 C): (..., C)."""
    # Compilers fuse this by themselves.
    if fits(x) and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return gated_gelu_kernel(x.contiguous())
    value, gate = x.chunk(2, dim=-1)
    gate = F.gelu(gate)
    # The backward pass needs the gate; without one its memory is free.
    return value * gate if torch.is_grad_enabled() else gate.mul_(value)


# Triton is imported when a kernel runs: it takes a second, and most processes have no GPU.


@torch.library.custom_op(
    "svd::group_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
)
def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise contiguous (n, ..., C); also return means and 1 / deviations (n, G), which its gradient needs."""
    from svd.model.kernels import triton as triton_kernels

    return triton_kernels.launch_group_norm(x, weight, bias, groups, eps, silu)


@torch.library.custom_op(
    "svd::group_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor scale, bool silu)"
    " -> (Tensor, Tensor, Tensor)",
)
def group_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    from svd.model.kernels import triton as triton_kernels

    return triton_kernels.launch_group_norm_backward(dy, x, weight, bias, mean, scale, silu)


@torch.library.custom_op(
    "svd::attend_frames", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, int heads) -> Tensor"
)
def attend_frames(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attend among the frames at each position of contiguous (B, T, S, C)."""
    from svd.model.kernels import triton as triton_kernels

    return triton_kernels.launch_attend_frames(q, k, v, heads)


@torch.library.custom_op("svd::gated_gelu", mutates_args=(), schema="(Tensor x) -> Tensor")
def gated_gelu_kernel(x: Tensor) -> Tensor:
    """Return value · GELU(gate) of the halves of contiguous (..., 2 C)."""
    from svd.model.kernels import triton as triton_kernels

    return triton_kernels.launch_gated_gelu(x)


@group_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    moments = [x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(x), moments[0], moments[1]


@group_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


@attend_frames.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return torch.empty_like(q)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = group_norm_backward(dy.contiguous(), *ctx.saved_tensors, ctx.silu)
    return (*gradients, None, None, None)


group_norm.register_autograd(_backward, setup_context=_keep)
