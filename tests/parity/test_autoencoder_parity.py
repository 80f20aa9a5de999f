"""The autoencoder against diffusers at equal weights, and the released models' parameter counts."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

from svd.model.autoencoder import Autoencoder, AutoencoderConfig, posterior_mean

TOLERANCE = 1e-5


def pair(temporal: bool, widths: tuple[int, ...], layers: int) -> tuple[Autoencoder, nn.Module]:
    """Ours and diffusers', with the same random weights."""
    levels = len(widths)
    options = {
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
    }
    if temporal:
        reference = diffusers.AutoencoderKLTemporalDecoder(**options)
    else:
        reference = diffusers.AutoencoderKL(**options, up_block_types=("UpDecoderBlock2D",) * levels)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            centre = float("norm" in name and name.endswith("weight"))
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
    config = AutoencoderConfig(block_out_channels=widths, layers_per_block=layers, temporal_decoder=temporal)
    ours = Autoencoder(config)
    ours.load_state_dict(reference.state_dict())
    return ours.eval(), reference.eval()


@pytest.mark.parametrize(
    ("widths", "layers", "dtype", "tolerance"),
    [
        ((32, 64, 64), 2, torch.float32, TOLERANCE),
        ((32, 64), 1, torch.float32, TOLERANCE),
        ((32, 32, 64, 64), 3, torch.float64, 1e-12),
    ],
)
@pytest.mark.parametrize("temporal", [True, False])
@torch.no_grad()
def test_encoder_and_decoder_equal_diffusers(
    temporal: bool, widths: tuple[int, ...], layers: int, dtype: torch.dtype, tolerance: float
) -> None:
    ours, reference = (model.to(dtype) for model in pair(temporal, widths, layers))
    frames = torch.rand(2, 3, 3, 16, 32, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 2 - 1
    posterior = reference.encode(frames.flatten(0, 1)).latent_dist
    moments = ours.encode(frames).flatten(0, 1)
    assert (moments - torch.cat([posterior.mean, posterior.logvar], dim=1)).abs().max() <= tolerance
    latents = posterior_mean(ours.encode(frames))
    options = {"num_frames": 3} if temporal else {}
    expected = reference.decode(latents.flatten(0, 1), **options).sample
    assert expected.std() > 0.1
    assert (ours.decode(latents).flatten(0, 1) - expected).abs().max() <= tolerance


@pytest.mark.parametrize("frames", [1, 2, 7])
@torch.no_grad()
def test_any_number_of_frames(frames: int) -> None:
    ours, reference = pair(True, (32, 64), 2)
    latents = torch.randn(1, frames, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = reference.decode(latents[0], num_frames=frames).sample
    assert (ours.decode(latents)[0] - expected).abs().max() <= TOLERANCE


def test_gradients_equal_diffusers() -> None:
    ours, reference = (model.double() for model in pair(True, (32, 64), 2))
    latents = torch.randn(1, 3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ours.decode(latents).square().sum().backward()
    reference.decode(latents[0], num_frames=3).sample.square().sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        if expected[name].grad is not None:
            scale = expected[name].grad.norm()
            assert (parameter.grad - expected[name].grad).norm() <= 1e-6 * scale + 1e-9, name


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_of_the_released_models() -> None:
    with torch.device("meta"):
        video = Autoencoder(AutoencoderConfig())
        image = Autoencoder(AutoencoderConfig(temporal_decoder=False))
    assert count(video.encoder) == 34_163_592
    assert count(image.decoder) == 49_490_179
    assert count(video.decoder) == 63_579_183
    assert count(video) == 97_742_847
