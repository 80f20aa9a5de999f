"""The kernels compute what torch's operators do, in Triton's interpreter (on a GPU: test_networks_on_gpu.py).

The interpreter replaces Triton's compiler when Triton is imported, so it has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svd.model.kernels import operators as fused

ROOT = Path(__file__).parents[2]
NORM = """
import torch
import torch.nn.functional as F
from svd.model.kernels import triton as kernels

torch.manual_seed(0)
kernels.CHUNK = 32
# One chunk; chunks of unequal length; channels that fill no block; more chunks than are merged at a time.
for shape, groups, mean in (((2, 7, 5, 64), 32, 1.0), ((1, 3, 20, 96), 32, 1000.0), ((3, 2, 9, 320), 32, 0.0),
                            ((1, 2, 600, 8), 4, -5.0)):
    for silu in (True, False):
        x = (torch.randn(shape) + mean).requires_grad_()
        weight = torch.randn(shape[-1]).requires_grad_()
        bias = torch.randn(shape[-1]).requires_grad_()
        leaves = (x, weight, bias)
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        y = F.group_norm(exact[0].movedim(-1, 1), groups, exact[1], exact[2], 1e-5).movedim(1, -1)
        expected = F.silu(y) if silu else y
        dy = torch.randn(shape)
        gradients = torch.autograd.grad(expected, exact, dy.double())
        with torch.no_grad():
            got, *moments = kernels.launch_group_norm(x, weight, bias, groups, 1e-5, silu)
            back = kernels.launch_group_norm_backward(dy, x, weight, bias, *moments, silu)
        # torch refuses an operator whose outputs share memory.
        for outputs in ((got, *moments), back):
            assert len({output.untyped_storage().data_ptr() for output in outputs}) == 3
        close = 1e-5 * (1 + abs(mean))
        torch.testing.assert_close(got, expected.float(), atol=close, rtol=1e-5)
        for a, b in zip(back, gradients):
            torch.testing.assert_close(a, b.float(), atol=close * b.abs().max().item(), rtol=1e-4)
"""
OTHERS = """
import torch
import torch.nn.functional as F
from svd.model.kernels import triton as kernels

torch.manual_seed(0)
for frames, heads in ((4, 3), (25, 2)):
    q, k, v = (torch.randn(2, frames, 5, heads * 64) for _ in range(3))
    a, b, c = (x.unflatten(-1, (heads, 64)).permute(0, 2, 3, 1, 4) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(a, b, c).permute(0, 3, 1, 2, 4).flatten(-2)
    torch.testing.assert_close(kernels.launch_attend_frames(q, k, v, heads), expected, atol=1e-5, rtol=1e-5)
for shape in ((3, 10), (2, 7, 400)):
    x = 3 * torch.randn(shape)
    value, gate = x.chunk(2, dim=-1)
    torch.testing.assert_close(kernels.launch_gated_gelu(x), value * F.gelu(gate), atol=1e-5, rtol=1e-5)
"""


@pytest.mark.parametrize("program", (NORM, OTHERS), ids=("norm", "attention and gate"))
def test_kernels_compute_what_torch_does(program: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_operators_know_the_shapes_of_their_results() -> None:
    """What compilers see of an operator: shapes, types and gradients, without running it."""
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 4, 64, dtype=torch.bfloat16, requires_grad=True)
        weight, bias = torch.empty(64, requires_grad=True), torch.empty(64, requires_grad=True)
        y, mean, scale = fused.group_norm(x, weight, bias, 32, 1e-5, True)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert mean.shape == scale.shape == (2, 32) and mean.dtype == scale.dtype == torch.float32
        gradients = torch.autograd.grad(y.sum(), (x, weight, bias))
        assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in (x, weight, bias)]
        assert fused.attend_frames(x, x, x, 4).shape == x.shape
