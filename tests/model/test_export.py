"""`svd export`: what training left becomes a file or a folder with the same networks in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from model_cards import read_card
from toy_models import toy_autoencoder, toy_unet
from typer.testing import CliRunner

from flows.cli.app import app
from svd.config import EncodersConfig
from svd.core.errors import UserError
from svd.model.formats import clip
from svd.model.formats.convert import convert_model
from svd.model.formats.encoders import load_encoders
from svd.model.formats.export import export_networks
from svd.model.formats.folders import load_autoencoder, load_unet, save_autoencoder, save_unet
from svd.model.unet import UNet

TOY = EncodersConfig(kind="toy-clip")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Outputs of a preset: an image-to-video model and what it needs."""
    config = clip.toy_config(32, 32)
    save_unet(toy_unet(), tmp_path / "image-to-video" / "unet", frames=5)
    save_autoencoder(toy_autoencoder(), tmp_path / "autoencoder")
    clip.save_toy(clip.build_clip(config, "toy"), config, tmp_path / "encoders")
    return tmp_path


@pytest.mark.parametrize("to", ["sgm", "diffusers"])
def test_the_networks_are_the_same(run: Path, to: str) -> None:
    target = run / "out" / ("model.safetensors" if to == "sgm" else "model")
    result = CliRunner().invoke(app, ["export", "model", str(run / "image-to-video"), str(target), "--to", to])
    assert result.exit_code == 0, result.output
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    pairs = [
        (load_unet(target), toy_unet()),
        (load_autoencoder(target), toy_autoencoder()),
        (load_encoders(target, TOY).image.visual, load_encoders(run / "encoders", TOY).image.visual),
    ]
    for found, expected in pairs:
        state = found.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())


def test_diffusers_loads_the_folder(run: Path) -> None:
    export_networks(run / "image-to-video", run / "pipeline", "diffusers", TOY)
    assert not (run / "pipeline" / "README.md").exists(), "a model of an earlier version has no card"
    pipeline = StableVideoDiffusionPipeline.from_pretrained(run / "pipeline")
    assert pipeline.unet.config.num_frames == 5
    assert json.loads((run / "pipeline" / "feature_extractor" / "preprocessor_config.json").read_text())


def test_the_model_card_comes_along(run: Path) -> None:
    (run / "image-to-video" / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    export_networks(run / "image-to-video", run / "pipeline", "diffusers", TOY)
    assert read_card(run / "pipeline")["license"] == "mit"


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 5, 8, 8, 8, generator=generator)
    return x, torch.tensor([0.3]), torch.randn(1, 1, 32, generator=generator), torch.tensor([[6.0, 127.0, 0.02]])


@pytest.fixture
def fixed(run: Path) -> UNet:
    """A U-Net with fixed mixers, each of another weight, in place of the run's."""
    unet, generator = toy_unet(mixer="fixed"), torch.Generator().manual_seed(0)
    for name, alpha in unet.named_buffers():
        assert name.endswith("mix_factor")
        alpha.copy_(torch.rand(1, generator=generator) * 0.9 + 0.05)
    save_unet(unet, run / "image-to-video" / "unet", frames=5)
    return unet


@torch.no_grad()
def test_fixed_mixers_are_exported_as_learned_ones_of_the_same_weight(run: Path, fixed: UNet) -> None:
    """Diffusers, Stability's code and we ourselves read an exported model as what it was trained to be."""
    expected = fixed(*inputs())
    export_networks(run / "image-to-video", run / "pipeline", "diffusers", TOY)
    export_networks(run / "image-to-video", run / "model.safetensors", "sgm", TOY)
    convert_model(run / "model.safetensors", run / "converted", "diffusers")
    convert_model(run / "image-to-video", run / "unet.safetensors", "sgm")
    for path in (run / "pipeline", run / "model.safetensors", run / "converted", run / "unet.safetensors"):
        unet = load_unet(path)
        assert unet.config.mixer == "learned"
        torch.testing.assert_close(unet(*inputs()), expected, atol=1e-5, rtol=1e-5)
    x, noise, context, ids = inputs()
    for folder in (run / "pipeline", run / "converted"):
        theirs = UNetSpatioTemporalConditionModel.from_pretrained(folder, subfolder="unet").eval()
        torch.testing.assert_close(theirs(x, noise[0], context, ids).sample, expected, atol=1e-5, rtol=1e-5)
    assert load_unet(run / "image-to-video").config.mixer == "fixed"


@torch.no_grad()
@pytest.mark.parametrize("to", ["sgm", "diffusers"])
def test_other_norm_groups_are_kept_here_and_refused_for_others(run: Path, to: str) -> None:
    """No released layout says how many groups there are: others would compute something else without a word."""
    unet, folder = toy_unet(norm_groups=8), run / "image-to-video"
    save_unet(unet, folder / "unet", frames=5)
    assert torch.equal(load_unet(folder)(*inputs()), unet(*inputs()))
    assert (unet(*inputs()) - toy_unet()(*inputs())).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"^released layouts normalise the U-Net in 32 groups, this one has 8; .*: 32'"):
        export_networks(folder, run / "model", to, TOY)


def test_the_presets_fixed_mixers_are_exported_bit_for_bit(run: Path) -> None:
    """Their weight is 0.5."""
    unet = toy_unet(mixer="fixed")
    save_unet(unet, run / "image-to-video" / "unet")
    export_networks(run / "image-to-video", run / "pipeline", "diffusers", TOY)
    with torch.no_grad():
        assert torch.equal(load_unet(run / "pipeline")(*inputs()), unet(*inputs()))


def test_mistakes_are_one_line_and_leave_nothing(run: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        export_networks(run / "image-to-video", run / "autoencoder", "diffusers", TOY)
    with pytest.raises(UserError, match=r"unet"):
        export_networks(run / "video-pretraining", run / "x", "diffusers", TOY)
    save_unet(toy_unet(in_channels=4, ids=2), run / "text" / "unet")
    with pytest.raises(UserError, match="diffusers has a pipeline for image-to-video models alone"):
        export_networks(run / "text", run / "x", "diffusers", TOY)
    assert not [path for path in run.iterdir() if path.name in ("x", ".x.tmp")]
