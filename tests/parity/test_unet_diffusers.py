"""The U-Net against diffusers' UNetSpatioTemporalConditionModel and UNet2DConditionModel, with equal weights."""

from __future__ import annotations

import copy
import itertools
import re

import diffusers
import pytest
import torch
from torch import Tensor, nn

from svd.model.unet import UNet, UNetConfig

# At 32 channels a group is one channel, and the gradients of biases before a GroupNorm vanish.
WIDTHS, CONTEXT = (64, 96), 24
LEVELS = (True, False)
CASES = list(itertools.product((1, 7, 77), (1, 3), (1, 5, 14)))
IDS = [f"{tokens}tokens-{batch}clips-{frames}frames" for tokens, batch, frames in CASES]


def config(**changes: object) -> UNetConfig:
    values = dict(
        in_channels=8,
        block_out_channels=WIDTHS,
        attention_levels=LEVELS,
        head_channels=16,
        cross_attention_dim=CONTEXT,
        id_embedding_dim=32,
        ids=3,
        norm_eps=1e-6,
    )
    return UNetConfig(**{**values, **changes})  # type: ignore[arg-type]


def reference() -> diffusers.UNetSpatioTemporalConditionModel:
    cross, plain = "CrossAttn{}BlockSpatioTemporal", "{}BlockSpatioTemporal"
    return diffusers.UNetSpatioTemporalConditionModel(
        in_channels=8,
        block_out_channels=WIDTHS,
        down_block_types=tuple((cross if has else plain).format("Down") for has in LEVELS),
        up_block_types=tuple((cross if has else plain).format("Up") for has in reversed(LEVELS)),
        num_attention_heads=tuple(width // 16 for width in WIDTHS),
        cross_attention_dim=CONTEXT,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
    )


@pytest.fixture(scope="module")
def pair() -> tuple[UNet, nn.Module]:
    """Our model and diffusers' with its random initialisation."""
    torch.manual_seed(0)
    theirs = reference()
    ours = UNet(config())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def inputs(tokens: int, batch: int, frames: int, height: int = 8, width: int = 12) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens * 100 + batch * 10 + frames)
    return (
        torch.randn(batch, frames, 8, height, width, generator=generator),
        torch.randn(batch, generator=generator),
        torch.randn(batch, tokens, CONTEXT, generator=generator),
        torch.tensor([[6.0, 127.0, 0.02], [23.0, 40.0, 0.3], [11.0, 255.0, 0.0]])[:batch],
    )


@pytest.mark.parametrize(("tokens", "batch", "frames"), CASES, ids=IDS)
def test_outputs(pair: tuple[UNet, nn.Module], tokens: int, batch: int, frames: int) -> None:
    ours, theirs = pair
    arguments = inputs(tokens, batch, frames)
    with torch.no_grad():
        expected, got = theirs(*arguments).sample, ours(*arguments)
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= 1e-5


def test_outputs_at_a_size_that_does_not_halve_evenly(pair: tuple[UNet, nn.Module]) -> None:
    ours, theirs = pair
    arguments = inputs(1, 1, 3, height=7, width=10)
    with torch.no_grad():
        expected, got = theirs(*arguments).sample, ours(*arguments)
    assert (got - expected).abs().max() <= 1e-5


def gradients(model: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Gradients of the parameters, of the latents and of the context for a fixed random cotangent."""
    x, c_noise, context, ids = arguments
    x, context = x.clone().requires_grad_(), context.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    output = model(x, c_noise, context, ids)
    output = output if isinstance(output, Tensor) else output.sample
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    (output * cotangent).sum().backward()
    assert x.grad is not None and context.grad is not None
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, x.grad, context.grad


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def doubles(pair: tuple[UNet, nn.Module]) -> tuple[UNet, nn.Module]:
    ours, theirs = pair
    return copy.deepcopy(ours).double(), copy.deepcopy(theirs).double()


@pytest.mark.parametrize(("tokens", "batch", "frames"), CASES, ids=IDS)
def test_gradients(doubles: tuple[UNet, nn.Module], tokens: int, batch: int, frames: int) -> None:
    """In float64, with sinusoids in float32 in both models."""
    x, c_noise, context, ids = (t.double() for t in inputs(tokens, batch, frames, height=4, width=6))
    got, got_x, got_context = gradients(doubles[0], (x, c_noise, context, ids))
    expected, expected_x, expected_context = gradients(doubles[1], (x, c_noise, context, ids))
    assert relative(got_x, expected_x) <= 1e-6
    assert relative(got_context, expected_context) <= 1e-6
    noise = 1e-12 * max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        if gradient.norm() > noise:
            assert relative(got[name], gradient) <= 1e-6, name
        else:  # a softmax over one key: one token, or one frame
            assert re.search(r"attn2\.to_[qk]|blocks\.0\.norm2|temporal.*attn1\.to_[qk]", name), name
            assert name not in got or got[name].norm() <= noise, name
    unused = set(expected) - set(got)
    assert bool(unused) == (tokens == 1)
    assert all(re.search(r"transformer_blocks\.0\.(attn2\.to_[qk]|norm2)\.", name) for name in unused)


def image_reference() -> diffusers.UNet2DConditionModel:
    """SD 2.1's U-Net at toy size; its `attention_head_dim` is the number of heads."""
    return diffusers.UNet2DConditionModel(
        in_channels=4,
        block_out_channels=WIDTHS,
        down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in LEVELS),
        up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(LEVELS)),
        attention_head_dim=tuple(width // 16 for width in WIDTHS),
        cross_attention_dim=CONTEXT,
        use_linear_projection=True,
    )


@pytest.fixture(scope="module")
def images() -> nn.Module:
    torch.manual_seed(1)
    return image_reference()


def image_inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(3, 4, 8, 12, generator=generator)
    return x, torch.tensor([1.2, -0.3, 0.7]), torch.randn(3, tokens, CONTEXT, generator=generator)


@pytest.mark.parametrize("tokens", [1, 7, 77])
def test_image_model(images: nn.Module, tokens: int) -> None:
    """Without temporal layers the state dict is SD 2.1's."""
    ours = UNet(config(in_channels=4, ids=0, temporal=False, norm_eps=1e-5))
    ours.load_state_dict(images.state_dict(), strict=True)
    x, c_noise, context = image_inputs(tokens)
    with torch.no_grad():
        expected, got = images(x, c_noise, context).sample, ours(x[:, None], c_noise, context)[:, 0]
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("tokens", [1, 77])
def test_image_mode_of_a_video_model(images: nn.Module, tokens: int) -> None:
    """The temporal layers are random and must not matter. Three images with their own text as the frames of a clip."""
    ours = UNet(config(in_channels=4, ids=0, norm_eps=1e-5))
    spatial = {
        re.sub(r"(resnets\.\d+\.)", r"\1spatial_res_block.", name): value for name, value in images.state_dict().items()
    }
    missing, unexpected = ours.load_state_dict(spatial, strict=False)
    assert not unexpected
    assert all("temporal" in name or "time_pos_embed" in name or "time_mixer" in name for name in missing)
    x, _, context = image_inputs(tokens)
    c_noise = torch.tensor([0.4])
    with torch.no_grad():
        expected = images(x, c_noise.expand(3), context).sample
        got = ours(x[None], c_noise, context[None], image_mode=True)[0]
    assert (got - expected).abs().max() <= 1e-5
