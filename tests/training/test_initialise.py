"""Wider inputs and temporal layers don't change what a U-Net computes; what doesn't fit is named."""

from __future__ import annotations

import pytest
import torch
from toy_models import toy_unet

from svd.core.errors import UserError
from svd.model.layers import sinusoids
from svd.model.unet import UNet, UNetConfig
from svd.training.initialise import carry_over, fresh_unet


def inputs(channels: int, frames: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, frames, channels, 8, 8, generator=generator),
        torch.tensor([0.1, -0.4]),
        torch.randn(2, 5, 32, generator=generator),
    )


@torch.no_grad()
def test_new_input_channels_change_nothing_whatever_they_hold() -> None:
    """4 channels become 8 (image-to-video), and 8 become 9 (interpolation)."""
    model = toy_unet(in_channels=4, ids=0)
    x, noise, context = inputs(4)
    expected = model(x, noise, context)
    for channels in (8, 9):
        model = carry_over(model, toy_unet(in_channels=channels, ids=0, learned_mask=channels == 9), "narrow")
        filled = torch.cat([x, torch.randn(2, 3, channels - 4, 8, 8)], dim=2)
        torch.testing.assert_close(model(filled, noise, context), expected, atol=1e-5, rtol=1e-5)
        assert not model.conv_in.weight[:, 4:].any()


def test_the_input_never_narrows() -> None:
    with pytest.raises(UserError, match=r"some/unet: 'conv_in.weight' is \(32, 8, 3, 3\), .* \(32, 4, 3, 3\)"):
        carry_over(toy_unet(in_channels=8), toy_unet(in_channels=4), "some/unet")


@torch.no_grad()
def test_an_inflated_image_model_is_the_image_model_in_image_mode() -> None:
    image = toy_unet(in_channels=4, ids=0, temporal=False)
    video = carry_over(image, toy_unet(in_channels=8, ids=2), "image")
    for layer in (video.add_embedding.linear_2.weight, video.add_embedding.linear_2.bias):
        layer.zero_()
    x, noise, context = inputs(4)
    wide = torch.cat([x, torch.randn(2, 3, 4, 8, 8)], dim=2)
    frames = torch.cat([image(x[:, t : t + 1], noise, context) for t in range(3)], dim=1)
    ids = torch.zeros(2, 2)
    torch.testing.assert_close(video(wide, noise, context, ids, image_mode=True), frames, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(video(wide, noise, context, ids), frames, atol=1e-2)


def test_all_686_tensors_of_sd_find_their_place_at_full_size() -> None:
    with torch.device("meta"):
        image, video = UNet(UNetConfig(temporal=False, ids=0)), UNet(UNetConfig(in_channels=8, ids=3))
    assert len(image.state_dict()) == 686
    carry_over(image, video, "SD 2.1")


def test_layers_without_a_counterpart_are_named() -> None:
    """Weights of a smaller model don't leave a part of a larger one at random."""
    small = toy_unet(in_channels=4, layers_per_block=1)
    large = toy_unet(in_channels=4, layers_per_block=2)
    with pytest.raises(UserError, match=r"small: lacks 'down_blocks\.0\..*'model\.unet'"):
        carry_over(small, large, "small")
    with pytest.raises(UserError, match=r"large: the preset's model has no place for 'down_blocks\.0\."):
        carry_over(large, small, "large")


@torch.no_grad()
@pytest.mark.parametrize(("gain", "low", "high"), [(1.0, 0.0, 0.1), (3.0, 0.3, 1.0)])
def test_the_position_gain_tells_frames_apart_and_leaves_the_rest(gain: float, low: float, high: float) -> None:
    unet, usual = (fresh_unet(toy_unet(ids=0).config, 0, "test", g) for g in (gain, 1.0))
    for name, parameter in unet.named_parameters():
        factor = gain if "time_pos_embed" in name and name.endswith("weight") else 1.0
        torch.testing.assert_close(parameter, factor * usual.get_parameter(name), msg=name)
    for block in (m for m in unet.modules() if hasattr(m, "time_pos_embed")):
        width = block.time_pos_embed.linear_1.in_features
        embedded = block.time_pos_embed(sinusoids(torch.arange(6.0), width))
        assert low < float(embedded.std(0).mean()) < high
