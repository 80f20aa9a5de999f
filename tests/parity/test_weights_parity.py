"""Folders written by this project load in diffusers, and folders of diffusers load here, with equal outputs."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from toy_models import VISION_HEADS, released_layout, toy_autoencoder, toy_clip, toy_unet

from svd.core.errors import UserError
from svd.model.formats.convert import convert_model
from svd.model.formats.folders import load_autoencoder, load_unet, save_autoencoder, save_pipeline, save_unet
from svd.model.formats.sgm import write_sgm


@torch.no_grad()
def test_our_unet_folder_gives_the_same_output_in_diffusers(tmp_path: Path) -> None:
    unet = toy_unet()
    save_unet(unet, tmp_path)
    reference = diffusers.UNetSpatioTemporalConditionModel.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 8, 8, 8)
    ids = torch.tensor([[6.0, 127.0, 0.02], [9.0, 30.0, 0.1]])
    noise, context = torch.tensor([0.3, -0.5]), torch.randn(2, 1, 32)
    expected = torch.cat(
        [reference(x[i : i + 1], noise[i], context[i : i + 1], ids[i : i + 1]).sample for i in range(2)]
    )
    assert (unet(x, noise, context, ids) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["AutoencoderKLTemporalDecoder", "AutoencoderKL"])
@torch.no_grad()
def test_our_autoencoder_folder_gives_the_same_output_in_diffusers(tmp_path: Path, kind: str) -> None:
    ours = toy_autoencoder(temporal=kind != "AutoencoderKL")
    save_autoencoder(ours, tmp_path)
    reference = getattr(diffusers, kind).from_pretrained(tmp_path).eval()
    frames = torch.rand(1, 3, 3, 16, 16) * 2 - 1
    moments = ours.encode(frames)
    latent = reference.encode(frames[0]).latent_dist.mode()
    assert (moments[0, :, :4] - latent).abs().max() <= 1e-5
    options = {"num_frames": 3} if kind != "AutoencoderKL" else {}
    assert (ours.decode(latent[None])[0] - reference.decode(latent, **options).sample).abs().max() <= 1e-5


def test_folders_of_diffusers_load_here(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        layers_per_block=2,
    )
    unet.save_pretrained(tmp_path / "unet", max_shard_size="200KB")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    loaded = load_unet(tmp_path / "unet")
    assert (loaded.config.ids, loaded.config.in_channels, loaded.config.head_channels) == (3, 8, 16)
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in loaded.state_dict().items())
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=16,
        scaling_factor=0.3,
    )
    vae.save_pretrained(tmp_path / "vae")
    autoencoder = load_autoencoder(tmp_path / "vae")
    assert (autoencoder.config.scaling_factor, autoencoder.config.norm_groups) == (0.3, 16)
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in autoencoder.state_dict().items())


def sampled(pipeline: StableVideoDiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        height=32,
        width=32,
        num_frames=3,
        num_inference_steps=2,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).frames


def test_a_pipeline_folder_of_ours_runs_in_diffusers(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "i2v", toy_unet(), toy_autoencoder(), toy_clip().visual, VISION_HEADS)
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "i2v")
    assert pipeline.scheduler.config.sigma_max == 700.0
    frames = sampled(pipeline)
    assert frames.shape == (1, 3, 3, 32, 32)
    assert frames.isfinite().all()


def test_a_converted_single_file_is_the_same_pipeline(tmp_path: Path) -> None:
    """The conversion of a single file, and the folder saved from its networks, give the same frames."""
    parts = released_layout()
    write_sgm(tmp_path / "svd.safetensors", parts)
    convert_model(tmp_path / "svd.safetensors", tmp_path / "converted", "diffusers")
    unet, autoencoder = load_unet(tmp_path / "converted"), load_autoencoder(tmp_path / "converted")
    save_pipeline(tmp_path / "saved", unet, autoencoder, toy_clip().visual, VISION_HEADS)
    first = sampled(StableVideoDiffusionPipeline.from_pretrained(tmp_path / "converted"))
    second = sampled(StableVideoDiffusionPipeline.from_pretrained(tmp_path / "saved"))
    assert torch.equal(first, second)


def test_models_without_a_pipeline_are_refused(tmp_path: Path) -> None:
    visual = toy_clip().visual
    with pytest.raises(UserError, match="diffusers has a pipeline for image-to-video models alone"):
        save_pipeline(tmp_path, toy_unet(in_channels=4, ids=2), toy_autoencoder(), visual, VISION_HEADS)
    with pytest.raises(UserError, match="save its parts instead"):
        save_pipeline(tmp_path, toy_unet(), toy_autoencoder(temporal=False), visual, VISION_HEADS)
    assert not list(tmp_path.iterdir())
