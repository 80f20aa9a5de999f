"""Model folders: strict, exact, and readable messages for what doesn't fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from toy_models import toy_autoencoder, toy_unet

from svd.core.errors import UserError
from svd.model.autoencoder import Autoencoder
from svd.model.formats.folders import (
    WEIGHTS,
    checkpoint_hash,
    load_autoencoder,
    load_unet,
    save_autoencoder,
    save_unet,
    weights_file,
)
from svd.model.unet import UNet, UNetConfig


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"in_channels": 4, "ids": 2},
        {"in_channels": 9, "learned_mask": True, "mask_size": (4, 6)},
        {"in_channels": 8, "ids": 4, "mixer": "fixed"},
        {"in_channels": 4, "ids": 0, "temporal": False},
    ],
)
def test_unets_of_every_task_come_back(tmp_path: Path, changes: dict) -> None:
    unet = toy_unet(**changes)
    save_unet(unet, tmp_path)
    loaded = load_unet(tmp_path)
    assert loaded.config == unet.config
    assert same(loaded, unet)


@pytest.mark.parametrize("temporal", [True, False])
def test_autoencoders_come_back(tmp_path: Path, temporal: bool) -> None:
    autoencoder = toy_autoencoder(temporal)
    save_autoencoder(autoencoder, tmp_path)
    loaded = load_autoencoder(tmp_path)
    assert loaded.config == autoencoder.config
    assert same(loaded, autoencoder)


def test_saving_twice_gives_the_same_hash_and_a_change_another(tmp_path: Path) -> None:
    autoencoder = toy_autoencoder()
    for name in ("a", "b"):
        save_autoencoder(autoencoder, tmp_path / name)
    assert checkpoint_hash(tmp_path / "a") == checkpoint_hash(tmp_path / "b")
    with torch.no_grad():
        autoencoder.quant_conv.bias[0] += 1
    save_autoencoder(autoencoder, tmp_path / "b")
    assert checkpoint_hash(tmp_path / "a") != checkpoint_hash(tmp_path / "b")
    with pytest.raises(UserError, match="not a model folder"):
        checkpoint_hash(tmp_path / "nowhere")


def test_a_pipeline_folder_is_entered_and_a_type_is_given(tmp_path: Path) -> None:
    save_unet(toy_unet(), tmp_path / "unet")
    save_autoencoder(toy_autoencoder(), tmp_path / "vae")
    assert isinstance(load_unet(tmp_path), UNet)
    autoencoder = load_autoencoder(tmp_path, dtype=torch.bfloat16)
    assert isinstance(autoencoder, Autoencoder)
    assert {p.dtype for p in autoencoder.parameters()} == {torch.bfloat16}


def test_a_config_that_does_not_fit_its_weights_is_explained(tmp_path: Path) -> None:
    save_unet(toy_unet(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["svd"]["in_channels"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"1 misshaped \(conv_in\.weight is 32x8x3x3 instead of 32x4x3x3\)"):
        load_unet(tmp_path)


def test_broken_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_unet(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_unet(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(UserError, match="'FluxTransformer2DModel' isn't a U-Net"):
        load_unet(tmp_path)
    with pytest.raises(UserError, match="'FluxTransformer2DModel' isn't an autoencoder"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"svd": {"bogus": 1}}')
    with pytest.raises(UserError, match=r"unknown UNetConfig field\(s\) bogus"):
        load_unet(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": None}, "'block_out_channels' is missing"),
        ({"block_out_channels": 320}, "not the configuration of a U-Net"),
        ({"block_out_channels": [320, "640"]}, "not the configuration of a U-Net"),
        ({"block_out_channels": [48, 96]}, "not the configuration of a U-Net .*must be a multiple of 32"),
        ({"num_attention_heads": [2, 4, 8]}, "not the configuration of a U-Net"),
        ({"num_attention_heads": 0}, "not the configuration of a U-Net"),
        ({"down_block_types": [1, 2]}, "not the configuration of a U-Net"),
        ({"projection_class_embeddings_input_dim": None}, "'projection_class_embeddings_input_dim' is missing"),
        ({"cross_attention_dim": None}, "'cross_attention_dim' is missing"),
        ({"svd": {"block_out_channels": "wide"}}, "block_out_channels: Input should be a valid tuple"),
        ({"svd": 7}, "expected an object with the fields of UNetConfig"),
    ],
)
def test_odd_values_in_a_config_are_one_line(tmp_path: Path, changes: dict, message: str) -> None:
    save_unet(toy_unet(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["svd"]
    assert load_unet_config(tmp_path, config).block_out_channels == (32, 64)
    changed = {name: value for name, value in (config | changes).items() if value is not None}
    with pytest.raises(UserError, match=message) as error:
        load_unet_config(tmp_path, changed)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def load_unet_config(folder: Path, config: dict) -> UNetConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return load_unet(folder).config


@pytest.mark.parametrize(
    "changes", [{"block_out_channels": None}, {"block_out_channels": 7}, {"svd": {"in_channels": "x"}}]
)
def test_odd_values_in_an_autoencoders_config_are_one_line(tmp_path: Path, changes: dict) -> None:
    save_autoencoder(toy_autoencoder(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["svd"]
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))
    with pytest.raises(UserError, match=r"config\.json: .*(is missing|an autoencoder|in_channels: )") as error:
        load_autoencoder(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_and_pickled_weights_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no {WEIGHTS} in this folder"):
        weights_file(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(UserError, match="pickled checkpoints can run code"):
        weights_file(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        weights_file(tmp_path / "nowhere")
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert weights_file(tmp_path).name == "diffusion_pytorch_model.fp16.safetensors"
