"""Small random networks as the stages leave them, and `svd generate` on them."""

import math

import pytest
import torch
from PIL import Image
from project_folder import give_presets
from typer.testing import CliRunner

from flows.cli import generate_models
from flows.cli.generate import generate_app
from svd.core.errors import UserError
from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.formats.clip import build_clip, save_toy, toy_config
from svd.model.formats.folders import save_autoencoder, save_unet
from svd.model.unet import UNet, UNetConfig

STAGES = {
    "high-quality-finetuning": (4, 2),
    "image-to-video": (8, 3),
    "multiview-finetuning": (8, 4),
    "frame-interpolation": (9, 3),
}
QUICK = ["--steps", "2", "--device", "cpu"]
SIZE = ["--frames", "3", "--height", "64", "--width", "96"]


def small_unet(channels: int, ids: int) -> UNet:
    unet = UNet(
        UNetConfig(
            in_channels=channels,
            ids=ids,
            block_out_channels=(32, 32),
            attention_levels=(True, True),
            layers_per_block=1,
            head_channels=16,
            cross_attention_dim=32,
            id_embedding_dim=16,
            learned_mask=channels == 9,
        )
    )
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter[0].numel()))
    return unet.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An `outputs` folder as the stages of the preset `tiny` would leave it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("outputs")
    config = toy_config(16, 32)
    save_toy(build_clip(config, "test"), config, root / "tiny/encoders")
    autoencoder = Autoencoder(AutoencoderConfig(block_out_channels=(32, 32), layers_per_block=1))
    save_autoencoder(autoencoder, root / "tiny/autoencoder")
    for stage, sizes in STAGES.items():
        save_unet(small_unet(*sizes), root / "tiny" / stage / "unet")
    return root


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_models, "OUTPUTS", trained)
    monkeypatch.chdir(give_presets(tmp_path))

    def invoke(*arguments):
        result = CliRunner().invoke(generate_app, [str(a) for a in arguments])
        if isinstance(result.exception, UserError):
            raise result.exception
        assert result.exit_code == 0, (result.output, result.exception)
        return result.stdout.split()

    return invoke


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "cup.png"
    Image.radial_gradient("L").convert("RGB").resize((80, 80)).save(path)
    return path
