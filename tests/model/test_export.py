"""`svd export`: what training left becomes a file or a folder with the same networks in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from toy_models import toy_autoencoder, toy_unet
from typer.testing import CliRunner

from flows.cli import app
from svd.config import EncodersConfig
from svd.model import clip
from svd.model.conditioning import load_encoders
from svd.model.export import export
from svd.model.weights import load_autoencoder, load_unet, save_autoencoder, save_unet
from svd.stage import UserError

TOY = EncodersConfig(kind="toy-clip")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Outputs of a preset: an image-to-video model and what it needs."""
    config = clip.toy_config(32, 32)
    save_unet(toy_unet(), tmp_path / "image-to-video" / "unet", frames=5)
    save_autoencoder(toy_autoencoder(), tmp_path / "autoencoder")
    clip.save_toy(clip.build(config, "toy"), config, tmp_path / "encoders")
    return tmp_path


@pytest.mark.parametrize("to", ["sgm", "diffusers"])
def test_the_networks_are_the_same(run: Path, to: str) -> None:
    target = run / "out" / ("model.safetensors" if to == "sgm" else "model")
    result = CliRunner().invoke(app, ["export", str(run / "image-to-video"), str(target), "--to", to])
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
    export(run / "image-to-video", run / "pipeline", "diffusers", TOY)
    pipeline = StableVideoDiffusionPipeline.from_pretrained(run / "pipeline")
    assert pipeline.unet.config.num_frames == 5
    assert json.loads((run / "pipeline" / "feature_extractor" / "preprocessor_config.json").read_text())


def test_mistakes_are_one_line_and_leave_nothing(run: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        export(run / "image-to-video", run / "autoencoder", "diffusers", TOY)
    with pytest.raises(UserError, match=r"unet"):
        export(run / "video-pretraining", run / "x", "diffusers", TOY)
    save_unet(toy_unet(in_channels=4, ids=2), run / "text" / "unet")
    with pytest.raises(UserError, match="diffusers has a pipeline for image-to-video models alone"):
        export(run / "text", run / "x", "diffusers", TOY)
    assert not [path for path in run.iterdir() if path.name in ("x", ".x.tmp")]
