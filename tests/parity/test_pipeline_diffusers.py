"""Our models and sampling against diffusers' StableVideoDiffusionPipeline on the same folder, with toy weights."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image

from svd.config import EncodersConfig, Sampling
from svd.core.files import write_json
from svd.generation import image_to_video, load_models
from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.formats.clip import build_clip, toy_config
from svd.model.formats.clip_names import to_transformers, transformers_config
from svd.model.formats.diffusers_configs import image_processor_json, model_index_json, scheduler_json
from svd.model.formats.folders import save_autoencoder, save_unet
from svd.model.safetensors import of_module, write_tensors
from svd.model.unet import UNet, UNetConfig

HEIGHT, WIDTH, FRAMES = 32, 32, 4
SETTINGS = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": 7, "motion_bucket": 127, "progress": False}
RELEASED, SHORT = Sampling(steps=25), Sampling(steps=4)


def randomised(module: torch.nn.Module, gain: float) -> torch.nn.Module:
    """Every weight random: fresh networks are zero or the identity at their ends, which would hide differences."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=gain / math.sqrt(parameter[0].numel()))
    return module.eval()


def write_pipeline(folder, norm_eps: float) -> None:
    torch.manual_seed(0)
    config = UNetConfig(
        in_channels=8,
        ids=3,
        block_out_channels=(32, 64),
        attention_levels=(True, False),
        layers_per_block=1,
        head_channels=8,
        cross_attention_dim=32,
        id_embedding_dim=32,
        norm_eps=norm_eps,
    )
    save_unet(randomised(UNet(config), 1.0), folder / "unet", FRAMES)
    autoencoder = Autoencoder(AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=1))
    save_autoencoder(randomised(autoencoder, 1.0), folder / "vae")
    architecture = toy_config(32, 32)
    architecture["vision_cfg"] |= {"image_size": 224, "patch_size": 32, "layers": 2}
    visual = of_module(build_clip(architecture, "test").visual)
    (folder / "image_encoder").mkdir()
    write_tensors(folder / "image_encoder/model.safetensors", to_transformers(visual))
    write_json(folder / "image_encoder/config.json", transformers_config(visual, heads=2))
    for name, value in {
        "model_index.json": model_index_json(),
        "scheduler/scheduler_config.json": scheduler_json(),
        "feature_extractor/preprocessor_config.json": image_processor_json(),
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    write_pipeline(path, norm_eps=1e-6)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    pipeline = StableVideoDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def models(folder):
    return load_models(folder, folder, folder, EncodersConfig())


@pytest.fixture(scope="module")
def pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


def tensor(pictures) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 255 for p in pictures])


def run_theirs(pipeline, pictures, seeds, sampling=SHORT, **options) -> torch.Tensor:
    """Frames (B, T, 3, H, W) in [0, 1]."""
    return pipeline(
        pictures,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=sampling.steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        **options,
    ).frames


def test_default_settings_give_the_same_frames(theirs, models, pictures):
    """25 Euler steps, guidance 1 to 3 over the frames, fps - 1, noise 0.02 on the picture, its latent unscaled."""
    expected = run_theirs(theirs, pictures, [3, 4], RELEASED)
    found = image_to_video(models, tensor(pictures), sampling=RELEASED, seed=[3, 4], **SETTINGS)
    assert expected.std() > 0.05
    assert (found - expected).abs().max() < 1e-3
    assert (found - expected).abs().mean() < 1e-5


@pytest.mark.parametrize(
    ("theirs_options", "ours_options"),
    [
        ({"fps": 13}, {"fps": 13}),
        ({"motion_bucket_id": 40}, {"motion_bucket": 40}),
        ({"noise_aug_strength": 0.4}, {"cond_aug": 0.4}),
        ({"min_guidance_scale": 1.5, "max_guidance_scale": 4.0}, {"guidance_range": (1.5, 4.0)}),
        ({"max_guidance_scale": 1.0}, {"guidance_range": (1.0, 1.0)}),
    ],
)
def test_every_option_means_the_same(theirs, models, pictures, theirs_options, ours_options):
    expected = run_theirs(theirs, pictures[0], [5], **theirs_options)
    default = image_to_video(models, tensor(pictures[:1]), sampling=SHORT, seed=5, **SETTINGS)
    found = image_to_video(models, tensor(pictures[:1]), sampling=SHORT, seed=5, **SETTINGS | ours_options)
    assert (found - expected).abs().mean() < 1e-5
    assert (found - default).abs().mean() > 1e-3


def test_chunks_of_the_decoder(theirs, models, pictures):
    expected = run_theirs(theirs, pictures[0], [5], decode_chunk_size=3)
    chunked = dataclasses.replace(models, decode_chunk=3, decode_overlap=0)
    found = image_to_video(chunked, tensor(pictures[:1]), sampling=SHORT, seed=5, **SETTINGS)
    assert (found - expected).abs().mean() < 1e-5


def test_the_original_eps_differs_measurably(models, folder, pictures, tmp_path, record_property):
    """Stability's code has GroupNorm eps 1e-5 where diffusers has 1e-6: how far apart the frames are (toy weights)."""
    write_pipeline(tmp_path, norm_eps=1e-5)
    original = load_models(tmp_path, folder, folder, EncodersConfig())
    clips = [image_to_video(m, tensor(pictures[:1]), sampling=SHORT, seed=5, **SETTINGS) for m in (models, original)]
    difference = (clips[0] - clips[1]).abs()
    record_property("mean_difference_of_eps", float(difference.mean()))
    assert 0 < difference.mean() < 1e-2
