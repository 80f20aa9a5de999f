"""The autoencoder's own properties: posterior, image mode, chunks without a seam, growing temporal layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_models import toy_autoencoder

from svd.model.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    add_temporal_decoder,
    chunk_starts,
    chunk_weights,
    fresh_autoencoder,
    posterior_mean,
    sample_posterior,
)


def latents(frames: int, seed: int = 0) -> torch.Tensor:
    """A smooth random walk, as latents of a video are."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(1, 1, 4, 6, 8, generator=generator)
    return start + (0.1 * torch.randn(1, frames, 4, 6, 8, generator=generator)).cumsum(1)


@torch.no_grad()
def test_encoding_in_chunks_is_encoding() -> None:
    autoencoder = toy_autoencoder()
    frames = torch.rand(2, 5, 3, 12, 16) * 2 - 1
    assert torch.allclose(autoencoder.encode(frames, chunk=3), autoencoder.encode(frames), atol=1e-5)
    with pytest.raises(ValueError, match="multiples of 2"):
        autoencoder.encode(frames[..., :11, :])


def test_the_posterior_has_the_moments_it_states() -> None:
    moments = torch.cat([torch.full((1, 1, 2, 64, 64), 3.0), torch.full((1, 1, 2, 64, 64), -2.0)], dim=2)
    draws = sample_posterior(moments, torch.Generator().manual_seed(0))
    assert torch.equal(posterior_mean(moments), torch.full((1, 1, 2, 64, 64), 3.0))
    assert abs(draws.mean() - 3) < 0.02
    assert abs(draws.std() - torch.tensor(-1.0).exp()) < 0.02


@torch.no_grad()
def test_the_log_variance_is_clamped() -> None:
    autoencoder = toy_autoencoder()
    autoencoder.quant_conv.bias[4:] = 100.0
    assert autoencoder.encode(torch.rand(1, 1, 3, 8, 8))[:, :, 4:].max() == 20.0


@torch.no_grad()
def test_clips_of_a_batch_do_not_touch_each_other() -> None:
    autoencoder = toy_autoencoder()
    a, b = latents(4, seed=1), latents(4, seed=2)
    both = autoencoder.decode(torch.cat([a, b]))
    assert torch.allclose(both[:1], autoencoder.decode(a), atol=1e-5)
    assert torch.allclose(both[1:], autoencoder.decode(b), atol=1e-5)


@torch.no_grad()
def test_image_mode_decodes_every_frame_alone() -> None:
    autoencoder = toy_autoencoder()
    z = latents(5)
    frames = autoencoder.decode(z, image_mode=True)
    alone = torch.cat([autoencoder.decode(z[:, t : t + 1], image_mode=True) for t in range(5)], dim=1)
    assert torch.allclose(frames, alone, atol=1e-5)
    assert not torch.allclose(frames, autoencoder.decode(z), atol=1e-2)
    assert torch.allclose(autoencoder.decode(z, chunk=2, image_mode=True), frames, atol=1e-5)


@torch.no_grad()
def test_an_image_decoder_is_exact_in_chunks() -> None:
    autoencoder = toy_autoencoder(temporal=False)
    z = latents(5)
    assert torch.allclose(autoencoder.decode(z, chunk=2), autoencoder.decode(z), atol=1e-5)


def jumps(frames: torch.Tensor) -> torch.Tensor:
    """Mean absolute change from frame to frame, (T - 1,)."""
    return frames.diff(dim=1).abs().mean((0, 2, 3, 4))


@torch.no_grad()
def test_overlapping_chunks_show_no_seam_where_hard_borders_do() -> None:
    """No change from frame to frame exceeds the whole decode's by more than a tenth; hard borders exceed it by more."""
    autoencoder, z = toy_autoencoder(), latents(24)
    whole = autoencoder.decode(z)
    most = jumps(whole).max()
    hard = autoencoder.decode(z, chunk=8)
    faded = autoencoder.decode(z, chunk=8, overlap=4)
    borders = jumps(hard)[[7, 15]] / jumps(whole)[[7, 15]]
    assert borders.max() > 1.3
    assert jumps(faded).max() <= 1.1 * most
    assert (faded - whole).abs().mean() < (hard - whole).abs().mean()


@torch.no_grad()
def test_a_chunk_that_holds_the_clip_is_the_whole_decode() -> None:
    autoencoder, z = toy_autoencoder(), latents(4)
    for chunk in (4, 9):
        assert torch.equal(autoencoder.decode(z, chunk=chunk, overlap=2), autoencoder.decode(z))


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 19))
def test_chunks_cover_every_frame_and_their_weights_sum_to_one(frames: int, chunk: int, overlap: int) -> None:
    if overlap >= chunk:
        with pytest.raises(ValueError, match="less than chunk"):
            chunk_starts(frames, chunk, overlap)
        return
    weights = chunk_weights(frames, chunk, overlap)
    assert torch.allclose(weights.sum(0), torch.ones(frames))
    assert (weights >= 0).all()
    for start, row in zip(chunk_starts(frames, chunk, overlap), weights, strict=True):
        assert row.nonzero().min() == start
        assert row.nonzero().max() < start + chunk


@torch.no_grad()
def test_a_grown_temporal_decoder_starts_as_the_image_decoder() -> None:
    image = toy_autoencoder(temporal=False)
    image.post_quant_conv.bias.zero_()
    video = add_temporal_decoder(image)
    z = latents(3)
    assert video.config.temporal_decoder
    assert torch.allclose(video.decode(z), image.decode(z), atol=1e-5)
    assert torch.allclose(video.encode(torch.ones(1, 1, 3, 8, 8)), image.encode(torch.ones(1, 1, 3, 8, 8)), atol=1e-5)


@torch.no_grad()
def test_the_folded_bias_is_exact_inside_the_border() -> None:
    image = toy_autoencoder(temporal=False)
    folded = add_temporal_decoder(image).decoder.conv_in(latents(1)[0])
    expected = image.decoder.conv_in(image.post_quant_conv(latents(1)[0]))
    assert torch.allclose(folded[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5)


def test_a_fresh_autoencoder_is_a_function_of_its_seed_with_a_narrow_posterior() -> None:
    config = AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=1)
    first, again, other = (fresh_autoencoder(config, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.encoder.conv_in.weight, other.encoder.conv_in.weight)
    with torch.no_grad():
        moments = first.encode(torch.rand(1, 2, 3, 16, 16) * 2 - 1)
    assert (0.5 * moments[:, :, 4:]).exp().mean() < 0.1
    assert moments[:, :, :4].std() > 0.2


def test_gradients_reach_every_parameter_of_a_two_layer_autoencoder() -> None:
    autoencoder = toy_autoencoder()
    reconstruction, _ = autoencoder(torch.rand(1, 3, 3, 8, 8), torch.Generator().manual_seed(0))
    reconstruction.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in autoencoder.parameters())


def test_compiles_to_one_graph() -> None:
    autoencoder = Autoencoder(AutoencoderConfig(block_out_channels=(32,), layers_per_block=1))
    explained = torch._dynamo.explain(autoencoder.decode)(torch.randn(1, 2, 4, 8, 8))
    assert explained.graph_break_count == 0
