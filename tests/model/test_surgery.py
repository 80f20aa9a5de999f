"""Wider inputs and temporal layers don't change what a U-Net computes."""

from __future__ import annotations

import pytest
import torch
from toy_models import toy_unet

from svd.model.checkpoint import fill, of_module, of_tensor
from svd.model.surgery import inflate, video_names, widen_conv_in
from svd.model.unet import UNet, UNetConfig
from svd.stage import UserError


def inputs(channels: int, frames: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, frames, channels, 8, 8, generator=generator),
        torch.tensor([0.1, -0.4]),
        torch.randn(2, 5, 32, generator=generator),
    )


@torch.no_grad()
def test_new_input_channels_change_nothing_whatever_they_hold() -> None:
    narrow = toy_unet(in_channels=4, ids=0)
    state = of_module(narrow)
    x, noise, context = inputs(4)
    expected = narrow(x, noise, context)
    for channels in (8, 9):
        state = widen_conv_in(state, channels)
        wide = toy_unet(in_channels=channels, ids=0)
        fill(wide, state, "wide")
        filled = torch.cat([x, torch.randn(2, 3, channels - 4, 8, 8)], dim=2)
        assert torch.allclose(wide(filled, noise, context), expected, atol=1e-5)
        assert not state["conv_in.weight"].load()[:, 4:].any()


def test_widening_is_the_identity_at_its_own_width_and_never_narrows() -> None:
    state = of_module(toy_unet(in_channels=8))
    assert widen_conv_in(state, 8) == state
    with pytest.raises(UserError, match="8 input channels, more than the 4 asked for"):
        widen_conv_in(state, 4)


@torch.no_grad()
def test_an_inflated_image_model_is_the_image_model_in_image_mode() -> None:
    image = toy_unet(in_channels=4, ids=0, temporal=False)
    video = inflate(of_module(image), toy_unet(in_channels=8, ids=2))
    x, noise, context = inputs(4)
    ids = torch.zeros(2, 2)
    for layer in (video.add_embedding.linear_2.weight, video.add_embedding.linear_2.bias):
        layer.zero_()
    wide = torch.cat([x, torch.randn(2, 3, 4, 8, 8)], dim=2)
    frames = torch.cat([image(x[:, t : t + 1], noise, context) for t in range(3)], dim=1)
    assert torch.allclose(video(wide, noise, context, ids, image_mode=True), frames, atol=1e-5)
    assert not torch.allclose(video(wide, noise, context, ids), frames, atol=1e-2)


def test_inflation_is_strict_and_changes_nothing_when_it_fails() -> None:
    image = of_module(toy_unet(in_channels=4, ids=0, temporal=False))
    image.pop("conv_out.bias")
    image["stray"] = of_tensor(torch.ones(1))
    video = toy_unet(in_channels=4, ids=0)
    before = {name: value.clone() for name, value in video.state_dict().items()}
    with pytest.raises(UserError, match=r"1 missing \(conv_out\.bias\), 1 unexpected \(stray\)"):
        inflate(image, video)
    assert all(torch.equal(before[name], value) for name, value in video.state_dict().items())


def test_all_686_tensors_of_sd_find_their_place_at_full_size() -> None:
    with torch.device("meta"):
        image = UNet(UNetConfig(temporal=False, ids=0))
        video = UNet(UNetConfig(in_channels=4, ids=2))
    names = video_names(of_module(image))
    shapes = {name: tuple(value.shape) for name, value in video.state_dict().items()}
    assert len(names) == 686
    assert all(shapes[name] == tensor.shape for name, tensor in names.items())
    assert video_names(names) == names
