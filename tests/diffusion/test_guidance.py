"""Guidance scales and the two ways to run both passes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svd.diffusion.guidance import Condition, constant, guided, linear, stack, triangle


def make(batch: int, offset: float) -> Condition:
    return Condition(
        torch.full((batch, 1, 4), offset), torch.arange(batch)[:, None].float(), torch.full((batch, 3, 2, 2, 2), offset)
    )


def denoise(x, sigma, condition):
    shift = condition.context.mean((1, 2)) + condition.ids[:, 0] + sigma
    return 0.5 * x + shift.reshape(-1, 1, 1, 1, 1) + condition.concat


def test_batched_and_sequential_agree_with_the_formula():
    x, sigma = torch.randn(2, 3, 2, 2, 2), torch.tensor([0.5, 2.0])
    cond, uncond, scale = make(2, 1.0), make(2, 0.0), linear(1.0, 3.0, 3)
    weight = scale.reshape(1, 3, 1, 1, 1)
    low, high = denoise(x, sigma, uncond), denoise(x, sigma, cond)
    expected = low + weight * (high - low)
    for passes in ("batched", "sequential", "auto"):
        torch.testing.assert_close(guided(denoise, cond, uncond, scale, passes)(x, sigma), expected)


def test_the_doubled_batch_is_uncond_then_cond():
    seen = []

    def spy(x, sigma, condition):
        seen.append(condition.context[:, 0, 0].tolist())
        return denoise(x, sigma, condition)

    guided(spy, make(2, 1.0), make(2, 0.0), constant(2.0, 3), "batched")(torch.zeros(2, 3, 2, 2, 2), torch.ones(2))
    assert seen == [[0, 0, 1, 1]]


def test_scale_one_skips_the_unconditional_pass():
    calls = []

    def spy(x, sigma, condition):
        calls.append(len(x))
        return denoise(x, sigma, condition)

    x = torch.randn(2, 3, 2, 2, 2)
    result = guided(spy, make(2, 1.0), make(2, 0.0), constant(1.0, 3))(x, torch.ones(2))
    assert calls == [2]
    torch.testing.assert_close(result, denoise(x, torch.ones(2), make(2, 1.0)))


@pytest.mark.parametrize("passes", ["auto", "batched"])
def test_out_of_memory_falls_back_to_two_passes_only_when_allowed(passes):
    sizes = []

    def scarce(x, sigma, condition):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("too big")
        return denoise(x, sigma, condition)

    run = guided(scarce, make(2, 1.0), make(2, 0.0), constant(2.0, 3), passes)
    x = torch.zeros(2, 3, 2, 2, 2)
    if passes == "batched":
        with pytest.raises(torch.OutOfMemoryError):
            run(x, torch.ones(2))
        return
    run(x, torch.ones(2))
    run(x, torch.ones(2))
    assert sizes == [4, 2, 2, 2, 2]


def test_stack_refuses_signals_that_only_one_has():
    with pytest.raises(ValueError, match="'ids'"):
        stack(make(1, 0.0), Condition(torch.zeros(1, 1, 4), None, torch.zeros(1, 3, 2, 2, 2)))


@settings(deadline=None)
@given(low=st.floats(0, 5), high=st.floats(5, 12), frames=st.integers(1, 60))
def test_scales_stay_in_range(low, high, frames):
    for scale in (linear(low, high, frames), triangle(low, high, frames), triangle(low, high, frames, 0.5)):
        assert scale.shape == (frames,)
        assert scale.min() >= low - 1e-4
        assert scale.max() <= high + 1e-4


def test_shapes_of_the_scales():
    assert linear(1, 3, 3).tolist() == [1, 2, 3]
    assert constant(7, 2).tolist() == [7, 7]
    assert triangle(1, 2.5, 5).tolist() == pytest.approx([1, 1.75, 2.5, 1.75, 1])
    assert triangle(0, 1, 9, 0.5).tolist() == pytest.approx([0, 0.5, 1, 0.5, 0, 0.5, 1, 0.5, 0])
