"""The networks on a GPU compute what they compute on the CPU, in float32 and in bfloat16, eager and compiled."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from toy_models import randomised

from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.kernels import operators as fused
from svd.model.unet import UNet, UNetConfig

pytestmark = pytest.mark.gpu

TOY = UNetConfig(in_channels=8, ids=3, block_out_channels=(64, 128), attention_levels=(True, False), head_channels=32)
WIDTHS = (32, 64)


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32 are rounded to TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def arguments(config: UNetConfig, tokens: int, batch: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    x = torch.randn(batch, 5, config.in_channels, 16, 24)
    context = torch.randn(batch, tokens, config.cross_attention_dim)
    return x, torch.tensor([0.3, -0.7])[:batch], context, torch.tensor([[6.0, 127.0, 0.02]]).expand(batch, -1)


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return ((got.cpu().double() - expected.double()).norm() / expected.double().norm()).item()


def to_gpu(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Latents and context in `dtype`, noise levels and ids as they are."""
    return [tensor.cuda().to(dtype) if position in (0, 2) else tensor.cuda() for position, tensor in enumerate(tensors)]


@pytest.mark.parametrize("tokens", (1, 77))
@pytest.mark.parametrize(("dtype", "bound"), ((torch.float32, 2e-5), (torch.bfloat16, 3e-2)))
def test_the_u_net_and_its_gradients(dtype: torch.dtype, bound: float, tokens: int) -> None:
    unet = randomised(UNet(TOY))
    inputs = arguments(TOY, tokens)
    expected = unet(*inputs)
    expected.square().mean().backward()
    on_gpu = copy.deepcopy(unet).cuda().to(dtype)
    on_gpu.zero_grad(set_to_none=True)
    got = on_gpu(*to_gpu(inputs, dtype))
    got.float().square().mean().backward()
    assert relative(got.detach(), expected.detach()) < bound
    pairs = [(a.grad, b.grad) for a, b in zip(on_gpu.parameters(), unet.parameters(), strict=True)]
    assert all((a is None) == (b is None) for a, b in pairs)
    every = [
        torch.cat([g.detach().float().cpu().flatten() for g in side if g is not None])
        for side in zip(*pairs, strict=True)
    ]
    assert relative(every[0], every[1]) < 3 * bound


@pytest.mark.parametrize("policy", ("fine", "all"))
def test_checkpointing_changes_no_gradient(policy: str) -> None:
    unet = randomised(UNet(TOY)).cuda()
    again = UNet(replace(TOY, checkpointing=policy)).cuda()  # type: ignore[arg-type]
    again.load_state_dict(unet.state_dict())
    inputs = to_gpu(arguments(TOY, 77), torch.float32)
    for model in (unet, again):
        model(*inputs).square().mean().backward()
    for a, b in zip(unet.parameters(), again.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_blocks_that_are_compiled_compute_the_same() -> None:
    unet = randomised(UNet(TOY)).cuda()
    expected = {size: unet(*to_gpu(arguments(TOY, size), torch.float32)).detach().cpu() for size in (1, 77)}
    unet.compile_blocks()
    for size, exact in expected.items():
        assert relative(unet(*to_gpu(arguments(TOY, size), torch.float32)).detach(), exact) < 1e-4


@pytest.mark.parametrize("shape", ((25, 72, 128, 320), (1, 25, 9216, 320), (2, 14, 144, 2560), (1, 14, 36_864, 128)))
def test_group_norm_at_the_sizes_of_the_models(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.GroupNorm(32, shape[-1]).cuda()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x, dy = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) + 1 for _ in range(2))
    results = []
    for tokens, silu in ((x.detach().requires_grad_(), True), (x.double().requires_grad_(), False)):
        layer.to(tokens.dtype if silu else torch.float64).zero_grad()
        if silu:
            y = fused.norm(layer, tokens, silu=True)
        else:
            y = nn.functional.silu(layer(tokens.movedim(-1, 1)).movedim(1, -1))
        y.backward(dy.to(y.dtype))
        results.append((y.detach(), tokens.grad, layer.weight.grad, layer.bias.grad))
    for got, expected in zip(*results, strict=True):
        assert got is not None and expected is not None
        assert relative(got.float(), expected.cpu()) < 1e-2


def test_attention_over_frames_by_our_kernel() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 25, 600, 320, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    split = (x.cpu().double().unflatten(-1, (5, 64)).permute(0, 2, 3, 1, 4) for x in (q, k, v))
    expected = nn.functional.scaled_dot_product_attention(*split).permute(0, 3, 1, 2, 4).flatten(-2)
    with torch.no_grad():
        assert fused.can_attend_frames(q, 5)
        assert relative(fused.attend_frames(q, k, v, 5).float(), expected) < 1e-2


def test_attention_over_frames_of_more_positions_than_a_cuda_grid_has() -> None:
    """Fused kernels end at a batch of 65,535; 72 x 128 latents of eight clips have 73,728 positions."""
    from svd.model.layers import attend

    torch.manual_seed(0)
    q, k, v = (torch.randn(73_728, 1, 14, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    got = attend(q, k, v)[-3:]
    expected = nn.functional.scaled_dot_product_attention(*(x[-3:].float().cpu() for x in (q, k, v)))
    assert relative(got.float(), expected) < 1e-2


@pytest.mark.parametrize("chunk", (None, 3))
@pytest.mark.parametrize(("dtype", "bound"), ((torch.float32, 2e-5), (torch.bfloat16, 3e-2)))
@torch.no_grad()
def test_the_autoencoder(dtype: torch.dtype, bound: float, chunk: int | None) -> None:
    model = randomised(Autoencoder(AutoencoderConfig(block_out_channels=WIDTHS)))
    torch.manual_seed(2)
    latents = torch.randn(1, 5, 4, 16, 24)
    on_gpu = copy.deepcopy(model).cuda().to(dtype)
    got = on_gpu.decode(latents.cuda().to(dtype), chunk)
    assert relative(got.float(), model.decode(latents, chunk)) < bound
