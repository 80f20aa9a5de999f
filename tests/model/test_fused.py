"""The layers with our operators in place of torch's, whose kernels are replaced here by exact ones for the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_models import randomised

import svd.model
from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.kernels import operators as fused
from svd.model.unet import UNet, UNetConfig

TOY = UNetConfig(in_channels=8, ids=3, block_out_channels=(32, 64), attention_levels=(True, False), head_channels=32)


def moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """x as (n, P, G, C / G), its means and variances (n, 1, G, 1)."""
    parts = x.flatten(1, -2).unflatten(-1, (groups, -1)).double()
    return parts, parts.mean((1, 3), keepdim=True), parts.var((1, 3), keepdim=True, correction=0)


class Kernels(SimpleNamespace):
    """What svd.model.kernels.triton computes, in float64."""

    calls: set[str]

    def launch_group_norm(self, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Any:
        self.calls.add("group_norm")
        parts, mean, variance = moments(x, groups)
        scale = (variance + eps).rsqrt()
        y = ((parts - mean) * scale).flatten(2) * weight + bias
        y = (F.silu(y) if silu else y).reshape(x.shape).to(x.dtype)
        return y, mean.flatten(1).float(), scale.flatten(1).float()

    def launch_group_norm_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, silu: bool
    ) -> Any:
        self.calls.add("group_norm_backward")
        assert dy.is_contiguous() and x.is_contiguous()
        groups = mean.shape[1]
        value = (moments(x, groups)[0] - mean[:, None, :, None]) * scale[:, None, :, None]
        w, b = weight.unflatten(0, (groups, -1)), bias.unflatten(0, (groups, -1))
        gradient = dy.flatten(1, -2).unflatten(-1, (groups, -1)).double()
        gate = torch.sigmoid(value * w + b)
        if silu:
            gradient = gradient * gate * (1 + (value * w + b) * (1 - gate))
        d_weight, d_bias = (gradient * value).sum((0, 1)).flatten(), gradient.sum((0, 1)).flatten()
        inner = gradient * w
        projected = value * (inner * value).mean((1, 3), keepdim=True)
        dx = scale[:, None, :, None] * (inner - inner.mean((1, 3), keepdim=True) - projected)
        return dx.reshape(x.shape).to(x.dtype), d_weight.to(weight.dtype), d_bias.to(bias.dtype)

    def launch_attend_frames(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        self.calls.add("attend_frames")
        split = (x.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4) for x in (q, k, v))
        return F.scaled_dot_product_attention(*split).permute(0, 3, 1, 2, 4).flatten(-2).contiguous()

    def launch_gated_gelu(self, x: Tensor) -> Tensor:
        self.calls.add("gated_gelu")
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """Every layer takes our operators for a tensor on a GPU."""
    own = Kernels(calls=set())
    monkeypatch.setitem(sys.modules, "svd.model.kernels.triton", own)
    monkeypatch.setattr(svd.model, "triton_kernels", own, raising=False)
    monkeypatch.setattr(fused, "fits", lambda x: True)
    torch._dynamo.reset()
    yield own
    torch._dynamo.reset()


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    x, context = torch.randn(2, 3, 8, 8, 8), torch.randn(2, 77, TOY.cross_attention_dim)
    return x.to(dtype), torch.tensor([0.3, -0.7]), context.to(dtype), torch.tensor([[6.0, 127.0, 0.02]]).expand(2, -1)


def outcome(unet: nn.Module) -> list[Tensor]:
    """Output and all gradients."""
    unet.zero_grad(set_to_none=True)
    output = unet(*inputs())
    output.square().mean().backward()
    return [output.detach(), *(p.grad for p in unet.parameters() if p.grad is not None)]


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_a_u_net_learns_the_same(compiled: bool, request: pytest.FixtureRequest) -> None:
    unet = randomised(UNet(TOY))
    expected = outcome(unet)
    kernels = request.getfixturevalue("kernels")
    if compiled:
        unet.compile_blocks(backend="aot_eager", fullgraph=True)
    got = outcome(unet)
    assert kernels.calls == {"group_norm", "group_norm_backward"}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, b.abs().max().item()), rtol=1e-4)


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_a_u_net_without_gradients_attends_and_gates_with_kernels(
    compiled: bool, request: pytest.FixtureRequest
) -> None:
    unet = randomised(UNet(TOY)).half()
    with torch.no_grad():
        expected = unet(*inputs(torch.float16)).float()
        kernels = request.getfixturevalue("kernels")
        if compiled:
            unet.compile_blocks(backend="aot_eager", fullgraph=True)
        got = unet(*inputs(torch.float16)).float()
    # A compiler fuses the gate by itself.
    assert kernels.calls == {"group_norm", "attend_frames"} | (set() if compiled else {"gated_gelu"})
    assert (got - expected).norm() < 0.005 * expected.norm()


def test_an_autoencoder_stays_in_channels_last_memory(request: pytest.FixtureRequest) -> None:
    model = randomised(Autoencoder(AutoencoderConfig(block_out_channels=(32, 64))))
    torch.manual_seed(2)
    latents, frames = torch.randn(1, 3, 4, 8, 8), torch.rand(1, 3, 3, 16, 16)
    with torch.no_grad():
        expected = model.decode(latents), model.encode(frames)
        kernels = request.getfixturevalue("kernels")
        got = model.decode(latents), model.encode(frames)
    assert kernels.calls == {"group_norm"}
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_without_a_compiler_or_headers_the_operators_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton builds its launchers in C when a kernel first runs: too late to find out."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(fused.shutil, "which", {"gcc": "/usr/bin/gcc"}.get)
    monkeypatch.setattr(fused.Path, "is_file", lambda path: path.name == "Python.h")
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: name == "triton" or None)
    assert fused._can_build()
    with monkeypatch.context() as patch:
        patch.setattr(fused.shutil, "which", lambda name: None)
        assert not fused._can_build()
        patch.setenv("CC", "/opt/cc")
        assert fused._can_build()
    monkeypatch.setattr(fused.Path, "is_file", lambda path: False)
    assert not fused._can_build()
