"""The tables between sgm's and diffusers' names are bijections with equal shapes, on every released tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.formats.sgm_names import (
    autoencoder_sgm_name,
    autoencoder_table,
    invert,
    is_attention_projection,
    unet_sgm_name,
    unet_table,
)
from svd.model.unet import UNet, UNetConfig

TABLES = Path(__file__).parent / "state_dict_keys"
RELEASED = UNetConfig(in_channels=8, ids=3)


def released(name: str) -> dict[str, list[int]]:
    """Names and shapes of a released checkpoint."""

    def flat(node: dict, prefix: str = "") -> dict[str, list[int]]:
        found = {}
        for key, value in node.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return found

    return flat(json.loads((TABLES / f"{name}.json").read_text()))


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def test_unet_maps_all_1428_released_tensors() -> None:
    diffusers, sgm = released("diffusers-unet"), released("sgm-unet-i2v")
    table = unet_table(RELEASED)
    assert len(table) == 1428
    assert set(table) == set(diffusers)
    assert set(table.values()) == set(sgm)
    assert all(diffusers[ours] == sgm[theirs] for ours, theirs in table.items())


def test_autoencoder_maps_372_tensors_and_leaves_quant_conv() -> None:
    diffusers = released("diffusers-vae")
    sgm = {f"encoder.{k}": v for k, v in released("sgm-vae-encoder").items()}
    sgm |= {f"decoder.{k}": v for k, v in released("sgm-temporal-decoder").items()}
    table = autoencoder_table(AutoencoderConfig())
    assert set(table) == set(diffusers)
    assert {ours for ours, theirs in table.items() if theirs not in sgm} == {"quant_conv.weight", "quant_conv.bias"}
    assert set(sgm) < set(table.values())
    for ours, theirs in table.items():
        if theirs in sgm:
            squeezed = sgm[theirs][:2] if is_attention_projection(ours) else sgm[theirs]
            assert diffusers[ours] == squeezed


def test_released_shapes_are_the_models_shapes() -> None:
    with torch.device("meta"):
        assert shapes(UNet(RELEASED)) == released("diffusers-unet")
        assert shapes(Autoencoder(AutoencoderConfig())) == released("diffusers-vae")


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(temporal=False, ids=0),
        UNetConfig(block_out_channels=(32, 64), attention_levels=(True, False), layers_per_block=1, head_channels=16),
        UNetConfig(block_out_channels=(32, 32, 64), attention_levels=(False, True, True), head_channels=32, ids=4),
    ],
)
def test_unet_table_is_a_bijection_at_other_sizes(config: UNetConfig) -> None:
    table = unet_table(config)
    assert len(invert(table)) == len(table)


def test_image_unet_has_the_video_unets_spatial_names() -> None:
    video, image = unet_table(UNetConfig(ids=0)), unet_table(UNetConfig(ids=0, temporal=False))
    spatial = {name for name in video.values() if "time_" not in name or name.startswith("time_embed")}
    assert set(image.values()) == spatial


def test_image_autoencoder_names() -> None:
    table = autoencoder_table(AutoencoderConfig(temporal_decoder=False))
    assert table["decoder.up_blocks.0.resnets.2.conv1.weight"] == "decoder.up.3.block.2.conv1.weight"
    assert table["decoder.mid_block.attentions.0.to_out.0.bias"] == "decoder.mid.attn_1.proj_out.bias"
    assert table["post_quant_conv.weight"] == "post_quant_conv.weight"


def test_names_of_no_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nonsense\.weight"):
        unet_sgm_name("nonsense.weight", RELEASED)
    with pytest.raises(ValueError, match=r"encoder\.nonsense\.weight"):
        autoencoder_sgm_name("encoder.nonsense.weight", 4)
    with pytest.raises(ValueError, match="not a bijection"):
        invert({"a": "x", "b": "x"})


@pytest.mark.parametrize("network", ["unet", "autoencoder"])
def test_pairs_of_the_released_files(network: str) -> None:
    """Written down by hand, not made by our rules: a swap of two tensors of equal shape shows here."""
    found = unet_table(RELEASED) if network == "unet" else autoencoder_table(AutoencoderConfig())
    for line in (TABLES / f"pairs-{network}.txt").read_text().splitlines():
        ours, theirs = line.split()
        assert found[ours] == theirs
