"""Layers of the U-Net against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from svd.model import layers
from svd.model.layers import Attention, Conv, FeedForward, GroupNorm, Mixer, PointConv, TemporalConv, sinusoids

shapes = st.integers(1, 4)


@given(value=st.floats(-2, 1000), half=st.integers(1, 40))
def test_sinusoids_are_cosines_then_sines(value: float, half: int) -> None:
    value = torch.tensor(value, dtype=torch.float32).item()
    got = sinusoids(torch.tensor([value]), 2 * half)[0]
    for k in range(half):
        angle = value * math.exp(-math.log(10_000) * k / half)
        # float32 keeps about 6e-8 of the angle
        assert got[k].item() == pytest.approx(math.cos(angle), abs=1e-3)
        assert got[half + k].item() == pytest.approx(math.sin(angle), abs=1e-3)


@settings(deadline=None, max_examples=30)
@given(batch=shapes, frames=st.integers(1, 9), positions=st.integers(1, 6))
def test_temporal_convolution_is_a_3_1_1_convolution(batch: int, frames: int, positions: int) -> None:
    torch.manual_seed(0)
    conv = TemporalConv(32, 64)
    assert conv.weight.shape == (64, 32, 3, 1, 1)
    x = torch.randn(batch, frames, positions, 32)
    expected = F.conv3d(x.permute(0, 3, 1, 2)[..., None], conv.weight, conv.bias, padding=(1, 0, 0))
    got = conv(x)
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected[..., 0].permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(batch=shapes, height=st.integers(1, 7), width=st.integers(1, 7), stride=st.integers(1, 2))
def test_convolution_keeps_tokens_contiguous(batch: int, height: int, width: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = Conv(4, 32, 3, stride=stride, padding=1)
    x = torch.randn(batch, height, width, 4)
    expected = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, stride=stride, padding=1)
    assert conv(x).is_contiguous()
    torch.testing.assert_close(conv(x), expected.permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)


def test_a_group_of_one_channel_forgets_its_mean_and_a_wider_one_does_not() -> None:
    """Why a narrow network needs fewer than 32 groups: a colour is a mean over the frame."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 32)
    coloured = x.clone()
    coloured[..., 0] += 1
    change = {groups: (GroupNorm(32, 1e-5, groups)(coloured) - GroupNorm(32, 1e-5, groups)(x)) for groups in (32, 8)}
    assert change[32].abs().max() < 1e-4
    assert change[8][..., 0].mean() > 0.3


def test_point_convolution_is_a_1x1_convolution() -> None:
    torch.manual_seed(0)
    conv, x = PointConv(32, 64), torch.randn(2, 3, 5, 32)
    expected = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias).permute(0, 2, 3, 1)
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(batch=shapes, frames=st.integers(1, 5), height=st.integers(1, 5), width=st.integers(2, 5))
def test_temporal_group_norm_has_statistics_over_frames_and_positions(
    batch: int, frames: int, height: int, width: int
) -> None:
    torch.manual_seed(0)
    norm = GroupNorm(64, 1e-5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(batch, frames, height, width, 64) * 3 + 1
    expected = F.group_norm(x.permute(0, 4, 1, 2, 3), 32, norm.weight, norm.bias, 1e-5).permute(0, 2, 3, 4, 1)
    got = norm(x.flatten(2, 3)).view_as(x)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_group_norm_of_bfloat16_has_float32_statistics() -> None:
    """65,536 values of mean 30: sums in bfloat16 would stop growing at 256 times the step."""
    torch.manual_seed(0)
    norm = GroupNorm(64, 1e-5)
    x = (torch.randn(1, 128, 256, 64) + 30).bfloat16()
    expected = norm(x.float())
    got = norm.bfloat16()(x).float()
    assert (got - expected).abs().max() < 0.02
    assert abs(got.mean().item()) < 1e-3


def test_feed_forward_is_the_same_with_and_without_gradients() -> None:
    torch.manual_seed(0)
    layer, x = FeedForward(32), torch.randn(2, 5, 32)
    assert [name for name, _ in layer.named_parameters()] == [
        "net.0.proj.weight",
        "net.0.proj.bias",
        "net.2.weight",
        "net.2.bias",
    ]
    value, gate = layer.net[0].proj(x).chunk(2, dim=-1)
    expected = layer.net[2](value * F.gelu(gate))
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.fixture
def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(64, 24, 16)


def test_one_token_needs_no_queries(attention: Attention) -> None:
    x, context = torch.randn(2, 5, 64), torch.randn(2, 1, 24)
    expected = attention.to_context(x, context)
    torch.testing.assert_close(attention.to_one_token(context).expand_as(expected), expected, atol=1e-5, rtol=1e-5)


def test_attention_over_frames_is_attention_of_transposed_tokens() -> None:
    torch.manual_seed(0)
    attention = Attention(64, 64, 16)
    for batch in (1, 3):
        x = torch.randn(batch, 5, 6, 64)
        expected = attention.over_positions(x.transpose(1, 2).flatten(0, 1)).view(batch, 6, 5, 64).transpose(1, 2)
        torch.testing.assert_close(attention.over_frames(x), expected, atol=1e-5, rtol=1e-5)


def test_attention_over_frames_copies_nothing_for_one_clip() -> None:
    """q, k and v of one clip are views: only the result is put back in order."""
    torch.manual_seed(0)
    attention, x = Attention(64, 64, 16), torch.randn(1, 5, 6, 64)
    seen: list[torch.Tensor] = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.extend((q, k, v))
        return F.scaled_dot_product_attention(q, k, v)

    original, layers.attend = layers.attend, spy
    try:
        attention.over_frames(x)
    finally:
        layers.attend = original
    assert len(seen) == 3
    assert all(t.shape == (6, 4, 5, 16) and t.stride() == (64, 16, 6 * 64, 1) for t in seen)


@settings(deadline=None, max_examples=20)
@given(limit=st.integers(1, 12), batch=st.integers(1, 12))
def test_attention_in_pieces_is_the_same(limit: int, batch: int) -> None:
    """Kernels refuse a batch over 65,535; the limit is lowered here."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, 2, 5, 16)
    sizes: list[int] = []
    original = F.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        sizes.append(q.shape[0])
        return original(q, k, v)

    before = layers.MAX_ATTENTION_BATCH
    layers.MAX_ATTENTION_BATCH, F.scaled_dot_product_attention = limit, spy
    try:
        got = layers.attend(q, k, v)
    finally:
        layers.MAX_ATTENTION_BATCH, F.scaled_dot_product_attention = before, original
    assert max(sizes) <= limit and sum(sizes) == batch
    torch.testing.assert_close(got, original(q, k, v), atol=1e-6, rtol=1e-5)


def test_mixers() -> None:
    assert Mixer("learned_with_images")(None).item() == pytest.approx(0.62246, abs=1e-5)
    assert Mixer("learned")(torch.tensor([True])).item() == pytest.approx(0.62246, abs=1e-5)
    fixed = Mixer("fixed")
    assert fixed(None).item() == 0.5
    assert not list(fixed.parameters()) and "mix_factor" in fixed.state_dict()
    alpha = Mixer("learned_with_images")(torch.tensor([True, False, True]))
    assert alpha.shape == (3, 1, 1, 1)
    assert alpha.flatten().tolist() == pytest.approx([1, 0.62246, 1], abs=1e-5)
    assert alpha[0].item() == 1
