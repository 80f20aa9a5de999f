"""LoRA on the temporal attention: where it is, what it changes, how it is stored, and diffusers reading it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svd.core.errors import UserError
from svd.model import lora
from svd.model.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    in_channels=8,
    block_out_channels=(32, 64),
    attention_levels=(True, False),
    layers_per_block=1,
    head_channels=16,
    cross_attention_dim=24,
    id_embedding_dim=32,
    ids=3,
    norm_eps=1e-6,
)


def make(config: UNetConfig = CONFIG) -> UNet:
    torch.manual_seed(0)
    unet = UNet(config)
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return unet.eval()


def inputs(tokens: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(2, 5, 8, 4, 6, generator=generator),
        torch.randn(2, generator=generator),
        torch.randn(2, tokens, 24, generator=generator),
        torch.rand(2, 3, generator=generator) * 20,
    )


def train(unet: UNet, name: str, seed: int = 0) -> None:
    """Give an adapter's second factor, zero at first, some value."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in unet.named_parameters():
        if f"lora_B.{name}." in key:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def output(unet: nn.Module, tokens: int = 1) -> Tensor:
    with torch.no_grad():
        return unet(*inputs(tokens))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
def adapted() -> UNet:
    """A U-Net with a trained adapter 'zoom'."""
    unet = make()
    lora.add_lora(unet, rank=4, alpha=8.0, name="zoom")
    train(unet, "zoom")
    return unet


def test_a_new_adapter_changes_nothing_and_is_all_that_trains() -> None:
    unet = make()
    before = output(unet)
    lora.add_lora(unet, rank=4, alpha=4.0, name="zoom")
    assert lora.adapters(unet) == ["zoom"]
    assert torch.equal(output(unet), before)
    trainable = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in unet.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(("tokens", "per_block"), [(1, 6), (3, 8)])
def test_adapters_are_on_temporal_attention_and_every_one_learns(tokens: int, per_block: int) -> None:
    """None on queries and keys that cannot matter: every tensor of a trained adapter has a gradient."""
    unet = make()
    lora.add_lora(unet, rank=2, alpha=2.0, name="zoom", context_tokens=tokens)
    train(unet, "zoom")
    adapted = [name for name, module in unet.named_modules() if isinstance(module, lora.LoraLayer)]
    assert len(adapted) == 4 * per_block
    assert all(re.search(r"\.temporal_transformer_blocks\.0\.attn[12]\.to_", name) for name in adapted)
    unet(*inputs(tokens)).square().sum().backward()
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.norm() > 1e-6, name


@pytest.mark.parametrize(("rank", "count"), [(4, 399_360), (16, 1_597_440)])
def test_parameters_at_full_size(rank: int, count: int) -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig(in_channels=8, ids=3))
        lora.add_lora(unet, rank, 1.0, "zoom")
    trainable = {name: parameter.numel() for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert sum(n for name, n in trainable.items() if "attn1" in name) == count
    assert not any(re.search(r"attn2\.to_[qk]", name) for name in trainable)


def test_merge_and_unmerge(adapted: UNet) -> None:
    expected, names = output(adapted), lora.adapters(adapted)
    plain = output(make())
    assert (expected - plain).abs().max() > 0.05
    lora.merge_adapters(adapted)
    close(output(adapted), expected)
    with pytest.raises(ValueError, match="unmerge"):
        lora.set_scales(adapted, {"zoom": 0.5})
    lora.unmerge_adapters(adapted)
    close(output(adapted), expected)
    assert lora.adapters(adapted) == names


def test_removing_keeps_what_is_merged(adapted: UNet) -> None:
    expected, keys = output(adapted), set(make().state_dict())
    lora.merge_adapters(adapted)
    lora.remove_lora(adapted)
    assert set(adapted.state_dict()) == keys and lora.adapters(adapted) == []
    close(output(adapted), expected)
    lora.add_lora(adapted, 2, 2.0, "zoom")
    close(output(adapted), expected)


def test_removing_unmerged_adapters_restores_the_model(adapted: UNet) -> None:
    lora.remove_lora(adapted)
    assert torch.equal(output(adapted), output(make()))


def test_scale_is_linear_in_the_weights(adapted: UNet) -> None:
    """Scale s adds s · alpha / rank · B·A."""
    lora.set_scales(adapted, {"zoom": 0.25})
    got = output(adapted)
    by_hand = make()
    for name, module in adapted.named_modules():
        if isinstance(module, lora.LoraLayer):
            delta = module.lora_B["zoom"].weight @ module.lora_A["zoom"].weight
            by_hand.get_submodule(name).weight.data += 0.25 * 8 / 4 * delta.detach()
    close(got, output(by_hand))
    lora.set_scales(adapted, {})
    assert torch.equal(output(adapted), output(make()))
    with pytest.raises(ValueError, match=r"no adapter \['pan'\]"):
        lora.set_scales(adapted, {"pan": 1.0})


def test_several_at_once(adapted: UNet, tmp_path: Path) -> None:
    one = output(adapted)
    lora.add_lora(adapted, rank=2, alpha=2.0, name="pan")
    train(adapted, "pan", seed=1)
    two = output(adapted)  # the new one alone
    assert {n.split(".")[-2] for n, p in adapted.named_parameters() if p.requires_grad} == {"pan"}
    lora.set_scales(adapted, {"zoom": 1.0})
    close(output(adapted), one)
    lora.set_scales(adapted, {"zoom": 1.0, "pan": 0.5})
    both = output(adapted)
    assert min((both - one).abs().max(), (both - two).abs().max()) > 0.01
    lora.merge_adapters(adapted)
    close(output(adapted), both)
    lora.unmerge_adapters(adapted)
    for name in ("zoom", "pan"):
        lora.save_lora(adapted, tmp_path / name, name)
    fresh = make()
    for name in ("zoom", "pan"):
        lora.load_lora(fresh, tmp_path / name, name)
    lora.set_scales(fresh, {"zoom": 1.0, "pan": 0.5})
    close(output(fresh), both)
    with pytest.raises(ValueError, match="already has an adapter 'pan'"):
        lora.add_lora(fresh, 2, 2.0, "pan")


def test_folder_is_the_same_on_every_save(adapted: UNet, tmp_path: Path) -> None:
    for folder in ("a", "b", "b"):
        lora.save_lora(adapted, tmp_path / folder, "zoom")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_loaded_adapter_is_frozen_and_equal(adapted: UNet, tmp_path: Path) -> None:
    expected = output(adapted)
    lora.save_lora(adapted, tmp_path / "zoom", "zoom")
    fresh = make()
    lora.load_lora(fresh, tmp_path / "zoom", "zoom")
    assert torch.equal(output(fresh), expected)
    assert not any(parameter.requires_grad for name, parameter in fresh.named_parameters() if "lora_" in name)


def test_diffusers_loads_the_folder(adapted: UNet, tmp_path: Path) -> None:
    """The snippet of svd/model/lora.py, on diffusers' U-Net with the same weights."""
    expected = output(adapted)
    lora.save_lora(adapted, tmp_path / "zoom", "zoom")
    theirs = diffusers.UNetSpatioTemporalConditionModel(
        in_channels=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        num_attention_heads=(2, 4),
        layers_per_block=1,
        cross_attention_dim=24,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
    ).eval()
    theirs.load_state_dict(make().state_dict())
    with torch.no_grad():
        model = PeftModel.from_pretrained(theirs, tmp_path / "zoom")
        close(model(*inputs()).sample, expected)
        merged = model.merge_and_unload()
        assert isinstance(merged, diffusers.UNetSpatioTemporalConditionModel)
        close(merged(*inputs()).sample, expected)


def corrupt_file(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")


def drop_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"')


def other_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))


def edit(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt_file, "not a readable peft LoRA"),
        (drop_config, "adapter_config.json: missing"),
        (broken_config, "not a readable peft LoRA"),
        (other_rank, r"is of shape \(4, .*\), this U-Net needs \(3, "),
        (edit(lambda state: {}), "holds no adapter weights"),
        (edit(lambda state: dict(sorted(state.items())[1:])), "lora_A of .* is missing"),
        (edit(lambda state: {k.replace("down_", "sideways_"): v for k, v in state.items()}), "not a linear layer"),
    ],
    ids=["pickle", "no-config", "broken-config", "rank", "empty", "half", "names"],
)
def test_broken_folders_are_refused_in_one_line(
    adapted: UNet, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    lora.save_lora(adapted, tmp_path / "zoom", "zoom")
    damage(tmp_path / "zoom")
    unet = make()
    with pytest.raises(UserError, match=message) as error:
        lora.load_lora(unet, tmp_path / "zoom", "zoom")
    assert "\n" not in str(error.value) and "zoom" in str(error.value)
    assert set(unet.state_dict()) == set(make().state_dict())


def test_other_sizes_are_refused(adapted: UNet, tmp_path: Path) -> None:
    lora.save_lora(adapted, tmp_path / "zoom", "zoom")
    with pytest.raises(UserError, match="this U-Net needs"):
        lora.load_lora(make(replace(CONFIG, block_out_channels=(64, 64))), tmp_path / "zoom", "zoom")


def test_an_image_model_has_nothing_to_adapt() -> None:
    with pytest.raises(ValueError, match="no temporal attention"):
        lora.add_lora(make(replace(CONFIG, temporal=False)), 4, 4.0, "zoom")
