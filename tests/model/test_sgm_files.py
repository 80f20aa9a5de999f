"""Single files in Stability's layout: read, written, and converted to folders and back without loss."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import VISION_HEADS, released_layout, toy_autoencoder, toy_clip, toy_unet
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from svd.core.errors import UserError
from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.formats.clip_names import to_open_clip, to_transformers, transformers_config
from svd.model.formats.convert import convert_model, expected
from svd.model.formats.folders import load_autoencoder, load_unet, save_unet
from svd.model.formats.sgm import (
    SgmParts,
    autoencoder_config,
    autoencoder_from_sgm,
    autoencoder_to_sgm,
    load_sgm,
    read_sgm,
    save_sgm,
    unet_config_of_parts,
    unet_from_sgm,
    unet_to_sgm,
    write_sgm,
)
from svd.model.safetensors import (
    Lazy,
    check_fit,
    of_module,
    of_tensor,
    read_header_metadata,
    read_tensors,
    write_tensors,
)
from svd.model.unet import UNet, UNetConfig

RELEASED = UNetConfig(in_channels=8, ids=3)


def write(tmp_path: Path, name: str = "svd.safetensors") -> Path:
    write_sgm(tmp_path / name, released_layout())
    return tmp_path / name


def equal(first: dict[str, Lazy], second: dict[str, Lazy]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n].load(), second[n].load()) for n in first)


def test_a_single_file_gives_the_networks_that_made_it(tmp_path: Path) -> None:
    models = load_sgm(write(tmp_path))
    unet, image, video = toy_unet(), toy_autoencoder(False, seed=3), toy_autoencoder()
    assert models.unet.config == unet.config
    assert equal(of_module(models.unet), of_module(unet))
    state = models.autoencoder.state_dict()
    for name, value in image.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(state[name], value)
    for name, value in video.state_dict().items():
        if name.startswith("decoder."):
            assert torch.equal(state[name], value)
    assert equal(of_module(load_unet(tmp_path / "svd.safetensors")), of_module(unet))
    assert equal(of_module(load_autoencoder(tmp_path / "svd.safetensors")), of_module(models.autoencoder))
    assert "token_embedding.weight" in models.clip
    assert "visual.proj" in models.clip


def test_file_to_folder_to_file_loses_nothing(tmp_path: Path) -> None:
    source = write(tmp_path)
    report = convert_model(source, tmp_path / "folder", "diffusers")
    assert report.missing == ()
    names = {path.relative_to(tmp_path / "folder").as_posix() for path in (tmp_path / "folder").rglob("*.json")}
    assert {"model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"} <= names
    back = convert_model(tmp_path / "folder", tmp_path / "back.safetensors", "sgm")
    assert back.missing == ()
    assert equal(read_tensors(source), read_tensors(tmp_path / "back.safetensors"))


def test_folder_to_file_to_folder_loses_nothing(tmp_path: Path) -> None:
    convert_model(write(tmp_path), tmp_path / "a", "diffusers")
    for path in ("image_vae", "sgm_rest.safetensors"):
        target = tmp_path / "a" / path
        if target.is_dir():
            for file in target.iterdir():
                file.unlink()
            target.rmdir()
        else:
            target.unlink()
    convert_model(tmp_path / "a", tmp_path / "b.safetensors", "sgm")
    convert_model(tmp_path / "b.safetensors", tmp_path / "c", "diffusers")
    for part in ("unet", "vae", "image_encoder"):
        file = next((tmp_path / "a" / part).glob("*.safetensors"))
        assert file.read_bytes() == (tmp_path / "c" / part / file.name).read_bytes()
        assert (tmp_path / "a" / part / "config.json").read_text() == (
            tmp_path / "c" / part / "config.json"
        ).read_text()


def test_the_first_stages_encoder_has_quant_conv_folded_in(tmp_path: Path) -> None:
    autoencoder = toy_autoencoder()
    save_sgm(tmp_path / "x.safetensors", toy_unet(), autoencoder)
    encoder = {
        name.removeprefix("encoder."): tensor.load()
        for name, tensor in read_sgm(tmp_path / "x.safetensors").first_stage.items()
        if name.startswith("encoder.conv_out.")
    }
    features = torch.rand(1, 64, 6, 6)
    with torch.no_grad():
        expected = autoencoder.quant_conv(autoencoder.encoder.conv_out(features))
    found = torch.nn.functional.conv2d(features, encoder["conv_out.weight"], encoder["conv_out.bias"], padding=1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert equal(of_module(load_sgm(tmp_path / "x.safetensors").autoencoder), of_module(autoencoder))


def test_the_image_decoder_variant_keeps_its_whole_autoencoder(tmp_path: Path) -> None:
    image = toy_autoencoder(temporal=False)
    save_sgm(tmp_path / "image_decoder.safetensors", toy_unet(), image)
    loaded = load_sgm(tmp_path / "image_decoder.safetensors").autoencoder
    assert not loaded.config.temporal_decoder
    assert equal(of_module(loaded), of_module(image))
    convert_model(tmp_path / "image_decoder.safetensors", tmp_path / "folder", "diffusers")
    assert equal(of_module(load_autoencoder(tmp_path / "folder")), of_module(image))


def test_an_image_model_of_sd_converts_without_a_pipeline(tmp_path: Path) -> None:
    parts = released_layout()
    unet = toy_unet(temporal=False, ids=0, in_channels=4)
    image = toy_autoencoder(temporal=False)
    parts.unet, parts.clip, parts.image_autoencoder = unet_to_sgm(of_module(unet), unet.config), {}, {}
    parts.first_stage = autoencoder_to_sgm(of_module(image), image.config)
    parts.text = {"token_embedding.weight": of_tensor(torch.rand(8, 4))}
    parts.config = {"unet": vars(unet.config), "first_stage": vars(image.config)}
    write_sgm(tmp_path / "sd.safetensors", parts)
    tensors = read_tensors(tmp_path / "sd.safetensors") | {"betas": of_tensor(torch.rand(4))}
    write_tensors(tmp_path / "sd2.safetensors", tensors)
    with pytest.raises(UserError, match="head_channels"):  # released ones have 64 channels a head, toys haven't
        unet_config_of_parts(read_sgm(tmp_path / "sd2.safetensors"))
    report = convert_model(tmp_path / "sd.safetensors", tmp_path / "folder", "diffusers")
    assert report.missing == ("image_encoder",)
    assert not (tmp_path / "folder" / "model_index.json").exists()
    assert equal(of_module(load_unet(tmp_path / "folder")), of_module(unet))


def test_released_configurations_are_told_from_shapes() -> None:
    for config in (RELEASED, UNetConfig(temporal=False, ids=0), UNetConfig(in_channels=9, ids=3)):
        with torch.device("meta"):
            tensors = of_module(UNet(config))
        parts = released_layout()
        parts.config, parts.unet = {}, unet_to_sgm(tensors, config)
        assert unet_config_of_parts(parts) == config
    for config in (AutoencoderConfig(), AutoencoderConfig(temporal_decoder=False)):
        with torch.device("meta"):
            tensors = autoencoder_to_sgm(of_module(Autoencoder(config)), config)
        assert autoencoder_config(tensors) == config


def test_the_image_tower_maps_both_ways_at_full_size() -> None:
    with torch.device("meta"):
        visual = open_clip.create_model("ViT-H-14", device="meta").visual
    tensors = {name: tensor for name, tensor in of_module(visual).items()}
    assert sum(t.nbytes // 4 for t in tensors.values()) == 632_076_800
    ours = to_transformers(tensors)
    config = transformers_config(tensors)
    assert (config["num_attention_heads"], config["num_hidden_layers"], config["image_size"]) == (16, 32, 224)
    assert (config["hidden_size"], config["intermediate_size"], config["projection_dim"]) == (1280, 5120, 1024)
    back = to_open_clip(ours, "folder")
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in tensors.items()}


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    source = write(tmp_path)
    tensors = read_tensors(source)
    cases = {
        "unknown": (tensors | {"what.is.this": of_tensor(torch.ones(1))}, "unknown names, such as 'what.is.this'"),
        "no_unet": ({n: t for n, t in tensors.items() if "diffusion_model" not in n}, "no U-Net"),
        "extra": (tensors | {"model.diffusion_model.extra.weight": of_tensor(torch.ones(1))}, "unexpected"),
    }
    lacking = dict(tensors)
    del lacking["model.diffusion_model.out.0.weight"]
    cases["lacking"] = (lacking, r"1 missing \(conv_norm_out\.weight\)")
    metadata = {"svd.config": read_header_metadata(source)["svd.config"]}
    for name, (changed, message) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        write_tensors(path, changed, metadata)
        with pytest.raises(UserError, match=message) as error:
            load_sgm(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="wrong sha256"):
        load_sgm(source, sha256="0" * 64)


def test_conversion_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    source = write(tmp_path)
    with pytest.raises(UserError, match="in sgm's layout already"):
        convert_model(source, tmp_path / "x.safetensors", "sgm")
    with pytest.raises(UserError, match="in diffusers' layout already"):
        convert_model(tmp_path, tmp_path / "x", "diffusers")
    with pytest.raises(UserError, match="exists already"):
        convert_model(source, tmp_path, "diffusers")
    with pytest.raises(UserError, match="no such file or folder"):
        convert_model(tmp_path / "nothing", tmp_path / "x", "diffusers")


@pytest.mark.parametrize("kind", [{}, {"learned_mask": True, "in_channels": 9, "mask_size": (4, 4)}])
def test_a_unet_alone_becomes_a_file_that_can_be_read(tmp_path: Path, kind: dict) -> None:
    unet = toy_unet(**kind)
    save_unet(unet, tmp_path / "unet", frames=9)
    report = convert_model(tmp_path / "unet", tmp_path / "x.safetensors", "sgm")
    assert report.missing == ("vae", "image_encoder")
    loaded = load_unet(tmp_path / "x.safetensors")
    assert loaded.config == unet.config and equal(of_module(loaded), of_module(unet))
    convert_model(tmp_path / "x.safetensors", tmp_path / "back", "diffusers")
    config = (tmp_path / "back" / "unet" / "config.json").read_text()
    assert config == (tmp_path / "unet" / "config.json").read_text() and '"num_frames": 9' in config


@pytest.mark.parametrize(
    ("name", "given", "frames"),
    [("svd", None, 14), ("svd_xt_1_1", None, 25), ("svd", 21, 21), ("text2video", None, 14)],
)
def test_a_released_files_name_tells_its_frames(tmp_path: Path, name: str, given: int | None, frames: int) -> None:
    convert_model(write(tmp_path, f"{name}.safetensors"), tmp_path / "folder", "diffusers", frames=given)
    assert json.loads((tmp_path / "folder" / "unet" / "config.json").read_text())["num_frames"] == frames


def test_only_image_to_video_models_get_a_pipelines_index(tmp_path: Path) -> None:
    parts = released_layout()
    unet = toy_unet(in_channels=4, ids=2)
    parts.unet = unet_to_sgm(of_module(unet), unet.config)
    parts.config["unet"] = vars(unet.config)
    write_sgm(tmp_path / "t2v.safetensors", parts)
    assert convert_model(tmp_path / "t2v.safetensors", tmp_path / "t2v", "diffusers").missing == ()
    assert not (tmp_path / "t2v" / "model_index.json").exists()
    convert_model(write(tmp_path), tmp_path / "i2v", "diffusers")
    processor = json.loads((tmp_path / "i2v" / "feature_extractor" / "preprocessor_config.json").read_text())
    tower = json.loads((tmp_path / "i2v" / "image_encoder" / "config.json").read_text())
    assert processor["crop_size"] == {"height": tower["image_size"], "width": tower["image_size"]}


SMALL = UNetConfig(
    in_channels=8, ids=3, block_out_channels=(64, 64), attention_levels=(True, False), layers_per_block=1,
    cross_attention_dim=32,
)  # fmt: skip
READ = ("input_blocks.0.0.weight", "out.2.weight", "input_blocks.1.0.out_layers.3.weight", "label_emb.0.0.weight")


@cache
def small_file() -> dict[str, Lazy]:
    """A U-Net as a released file would hold it, without our metadata."""
    with torch.device("meta"):
        return unet_to_sgm(of_module(UNet(SMALL)), SMALL)


def read_strictly(tensors: dict[str, Lazy]) -> UNetConfig:
    parts = SgmParts(unet=tensors)
    config = unet_config_of_parts(parts)
    check_fit(expected(UNet, config), unet_from_sgm(tensors, config), "file")
    return config


@given(st.one_of(st.sampled_from(READ), st.sampled_from(sorted(small_file()))), st.sampled_from(["", "line", "odd"]))
@settings(max_examples=25, deadline=None)
def test_a_damaged_released_unet_is_one_line(name: str, damage: str) -> None:
    assert read_strictly(small_file()) == SMALL
    tensors = dict(small_file())
    whole = tensors.pop(name)
    if damage:
        shape = (33,) if damage == "line" else tuple(n + 1 for n in whole.shape)
        tensors[name] = Lazy(shape, whole.dtype, whole.load)
    with pytest.raises(UserError) as error:
        read_strictly(tensors)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["", "line", "odd"])
def test_a_damaged_released_autoencoder_is_one_line(damage: str) -> None:
    config = AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=1)
    with torch.device("meta"):
        whole = autoencoder_to_sgm(of_module(Autoencoder(config)), config)
    for name in ("encoder.conv_out.weight", "encoder.down.1.block.0.conv2.weight", "encoder.conv_in.weight"):
        tensors = dict(whole)
        old = tensors.pop(name)
        if damage:
            shape = (33,) if damage == "line" else tuple(n + 1 for n in old.shape)
            tensors[name] = Lazy(shape, old.dtype, old.load)
        with pytest.raises(UserError):
            found = autoencoder_config(tensors)
            check_fit(expected(Autoencoder, found), autoencoder_from_sgm(tensors, found), "file")


def test_a_renamed_tensor_is_told_with_both_names() -> None:
    tensors = dict(small_file())
    tensors["out.9.weight"] = tensors.pop("out.0.weight")
    with pytest.raises(
        UserError, match=r"1 missing \(conv_norm_out.weight\), 1 unexpected \(out.9.weight \(in the file\)\)"
    ):
        read_strictly(tensors)


def test_conversion_to_half_precision(tmp_path: Path) -> None:
    convert_model(write(tmp_path), tmp_path / "half", "diffusers", dtype=torch.float16)
    assert {
        t.dtype for t in read_tensors(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors").values()
    } == {torch.float16}


def test_transformers_image_encoder_equals_open_clips(tmp_path: Path) -> None:
    visual = toy_clip().visual
    tensors = of_module(visual)
    config = {
        k: v for k, v in transformers_config(tensors, VISION_HEADS).items() if k not in ("architectures", "model_type")
    }
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).eval()
    state = {name: tensor.load() for name, tensor in to_transformers(tensors).items()}
    assert set(model.state_dict()) - {"vision_model.embeddings.position_ids"} == set(state)
    model.load_state_dict(state, strict=False)
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(image).image_embeds, visual(image), atol=1e-5)


def test_stored_configs_survive_replacing(tmp_path: Path) -> None:
    """A factor that was measured isn't lost on the way through a single file."""
    autoencoder = toy_autoencoder()
    autoencoder.config = replace(autoencoder.config, scaling_factor=0.5)
    save_sgm(tmp_path / "x.safetensors", toy_unet(), autoencoder)
    assert load_sgm(tmp_path / "x.safetensors").autoencoder.config.scaling_factor == 0.5
