"""Losses, optimiser and pixels of the first stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from curated import write_curation
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from svd.catalogue.shards import read_clip_bytes
from svd.catalogue.tables import read_clips
from svd.core.errors import UserError
from svd.media.video import write_mp4
from svd.model.perceptual import Perceptual
from svd.training.frames import ClipPixels, read_clip_frames, split_rows
from svd.training.losses import (
    PatchDiscriminator,
    ReconstructionLoss,
    adaptive_weight,
    flicker,
    hinge,
    kl_divergence,
    reconstruction_psnr,
)
from svd.training.muon import ITERATIONS, QUINTIC, Muon, orthogonalised


def test_kl_is_that_of_torch() -> None:
    average, logvar = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    posterior = torch.distributions.Normal(average, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).sum((2, 3, 4)).mean()
    assert torch.allclose(kl_divergence(torch.cat([average, logvar], dim=2)), expected)


def test_hinge_is_zero_beyond_the_margin() -> None:
    assert hinge(torch.tensor([1.5]), torch.tensor([-2.0])) == 0
    assert hinge(torch.tensor([0.0]), torch.tensor([0.0])) == 1
    assert hinge(torch.tensor([-1.0]), torch.tensor([1.0])) == 2


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    layer = nn.Parameter(torch.tensor([3.0, 4.0]))
    first, second = (layer * torch.tensor([3.0, 4.0])).sum(), (layer * torch.tensor([0.0, 2.0])).sum()
    assert abs(adaptive_weight(first, second, layer) - 2.5) < 1e-3
    assert adaptive_weight(first * 1e9, second, layer) == 1e4


def test_psnr_and_flicker_of_known_errors() -> None:
    real = torch.zeros(2, 3, 3, 8, 8)
    assert abs(reconstruction_psnr(real.flatten(0, 1), real.flatten(0, 1) + 0.2) - 20.0) < 1e-3
    assert flicker(real, real + 0.5) == 0
    fake = real.clone()
    fake[:, 1] += 0.3
    assert abs(flicker(real, fake) - 0.3) < 1e-6


def test_the_discriminator_sees_time_and_learns_to_tell_flicker() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(width=8)
    steady = torch.rand(8, 1, 3, 32, 32).expand(-1, 4, -1, -1, -1) * 2 - 1
    shaky = steady + 0.3 * torch.randn(8, 4, 3, 1, 1)
    assert judge(steady).shape[:3] == (8, 1, 4)
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3, betas=(0.5, 0.9))
    for _ in range(25):
        optimizer.zero_grad()
        loss = hinge(judge(steady), judge(shaky))
        loss.backward()
        optimizer.step()
    judge.eval()
    assert loss < 0.7
    assert judge(steady).mean() > judge(shaky).mean()


def test_the_reconstruction_loss_is_the_sum_of_its_parts() -> None:
    real, fake = torch.rand(2, 2, 3, 32, 32) * 2 - 1, torch.rand(2, 2, 3, 32, 32) * 2 - 1
    moments = torch.randn(2, 2, 8, 8, 8)
    perceptual = Perceptual()
    parts = ReconstructionLoss(perceptual, 0.5, 1e-3, squared_weight=2.0)(real, fake, moments)
    distance = perceptual(real.flatten(0, 1), fake.flatten(0, 1)).mean()
    kl = kl_divergence(moments) / (3 * 32 * 32)
    expected = (real - fake).abs().mean() + 2 * (real - fake).square().mean() + 0.5 * distance + 1e-3 * kl
    assert torch.allclose(parts.total, expected)
    assert ReconstructionLoss(None, 0.0, 0.0)(real, fake, None).total == parts.l1


def test_the_perceptual_distance_is_real_frozen_and_zero_for_equals() -> None:
    perceptual = Perceptual().train()
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    blurred = nn.functional.avg_pool2d(picture, 5, 1, 2)
    near = (picture + 0.02).clamp(-1, 1)
    assert perceptual(picture, picture).item() == 0
    assert perceptual(picture, blurred) > 4 * perceptual(picture, near)
    assert not any(p.requires_grad for p in perceptual.parameters())
    assert not any(m.training for m in perceptual.modules())


def test_lpips_weights_are_read_from_their_published_layout(tmp_path: Path) -> None:
    """torchvision's `features.*` and LPIPS' `lin*.model.1.weight`, from two files, give the network they came from."""
    torch.manual_seed(0)
    from stlpips_pytorch.stlpips import LPIPS

    source = LPIPS(net="alex", variant="vanilla", pretrained=False, verbose=False)
    state = source.state_dict()
    backbone = {f"features.{n.split('.', 2)[2]}": t.clone() for n, t in state.items() if n.startswith("net.")}
    heads = {n: t.abs().clone() for n, t in state.items() if n.startswith("lin") and not n.startswith("lins")}
    save_file(backbone, tmp_path / "alexnet.safetensors")
    torch.save(heads, tmp_path / "alex.pth")
    loaded = Perceptual("lpips-alex", [tmp_path / "alexnet.safetensors", tmp_path / "alex.pth"])
    source.load_state_dict(heads | {f"lins.{n[3]}.{n.split('.', 1)[1]}": t for n, t in heads.items()}, strict=False)
    a, b = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    assert torch.allclose(loaded(a, b), source.eval()(a, b).flatten())
    with pytest.raises(UserError, match="lack"):
        Perceptual("lpips-alex", [tmp_path / "alexnet.safetensors"])
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a plain state dict") as error:
        Perceptual("lpips-alex", [tmp_path / "bad.pth"])
    assert "\n" not in str(error.value)


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_orthogonalised_has_singular_values_near_one(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    given_values = torch.linalg.svdvals(matrix)
    values = torch.linalg.svdvals(orthogonalised(matrix))
    well = given_values > 0.05 * given_values[0]
    assert values.max() < 1.3
    assert values[well].min() > 0.5


@pytest.mark.parametrize("shape", [(16, 32), (8, 216), (96, 12)])
def test_iterating_on_the_gram_matrix_gives_what_iterating_on_the_matrix_gives(shape: tuple[int, int]) -> None:
    """Ill-conditioned (singular values over five decades), as momenta of a network are."""
    rank = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, rank, generator=torch.Generator().manual_seed(n)))[0] for n in shape)
    matrix = u * torch.logspace(0, -5, rank) @ v.T
    a, b, c = QUINTIC
    x = matrix.double() / matrix.double().norm()
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    assert torch.allclose(orthogonalised(matrix).double(), x, atol=1e-3)  # the smallest values carry the rounding of G


def test_muon_resumes_exactly() -> None:
    def trained(split: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3))
        optimizer = Muon(layer.parameters(), [layer[2].weight], lr=0.02, adam_lr=1e-3)
        x = torch.randn(2, 3, 8, 8)
        for step in range(6):
            if split and step == 3:
                state = optimizer.state_dict()
                optimizer = Muon(layer.parameters(), [layer[2].weight], lr=0.02, adam_lr=1e-3)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in layer.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


def test_frames_are_scaled_to_cover_and_cropped_at_the_centre(tmp_path: Path) -> None:
    """Left, middle and right thirds of a wide picture are red, green and blue: a square crop is mostly green."""
    frames = np.zeros((5, 64, 192, 3), np.uint8)
    for third in range(3):
        frames[:, :, third * 64 : third * 64 + 64, third] = 200
    write_mp4(tmp_path / "x.mp4", frames, 8)
    read = read_clip_frames((tmp_path / "x.mp4").read_bytes(), 4, 32, 32)
    assert read.shape == (4, 3, 32, 32)
    assert read[:, 1, :, 4:28].float().mean() > 180
    assert read[:, 0, :, 4:28].float().mean() < 25
    broken = (tmp_path / "x.mp4").read_bytes()[:200]
    assert read_clip_frames(broken, 4, 32, 32).shape == (0, 3, 32, 32)


def test_batches_are_a_function_of_seed_and_step_and_run_in_epochs(tmp_path: Path) -> None:
    folder = write_curation(tmp_path, train=4, test=1)
    training, held_out = split_rows(folder)
    assert [row["clip_id"] for row in held_out] == ["test-000"]
    pixels = ClipPixels(folder, training, 3, 32, 48)
    again = ClipPixels(folder, training, 3, 32, 48)
    batch = pixels.batch(7, 5, 2, 3, (32, 32))
    assert batch.shape == (2, 3, 3, 32, 32)
    assert batch.min() >= -1
    assert batch.max() <= 1
    assert torch.equal(batch, again.batch(7, 5, 2, 3, (32, 32)))
    assert not torch.equal(batch, pixels.batch(8, 5, 2, 3, (32, 32)))
    epoch = torch.cat([pixels.batch(7, step, 2, 3) for step in (0, 1)])
    clips = [pixels.clip(i).float() / 127.5 - 1 for i in range(4)]
    owners = [
        next(i for i, c in enumerate(clips) if any(torch.equal(w, c[s : s + 3]) for s in range(6))) for w in epoch
    ]
    assert sorted(owners) == [0, 1, 2, 3]


def test_clips_shorter_than_the_catalogue_says_are_explained(tmp_path: Path) -> None:
    folder = write_curation(tmp_path, train=1, test=1)
    rows = [row | {"frames": 20} for row in read_clips(folder).iter_rows(named=True)]
    assert read_clip_frames(read_clip_bytes(folder, rows[0]), 99, 32, 48).shape[0] == 8
    with pytest.raises(UserError, match="has 8 readable frames instead of 20"):
        ClipPixels(folder, rows, 12, 32, 48).clip(0)
