"""Picture metrics against independent implementations, and the alignment check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.multiview.alignment import Alignment, best_alignment, pairwise_psnr
from evaluation.multiview.image_metrics import (
    PSNR_CAP,
    Perceptor,
    clip_similarity,
    image_features,
    image_psnr,
    silhouette,
    silhouette_iou,
    ssim,
)
from evaluation.multiview.scores import published_rows
from svd.core.errors import UserError
from svd.synthetic.scenes import World, render_clip


def pictures(count: int = 3, size: int = 48) -> torch.Tensor:
    frames = np.stack([render_clip(World(0, "test"), index, 1, size, size, 8).frames[0] for index in range(count)])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def noisy(clean: torch.Tensor, deviation: float) -> torch.Tensor:
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return (clean + deviation * noise).clamp(0, 1)


def test_psnr_is_torchmetrics_per_picture() -> None:
    a, b = pictures(), noisy(pictures(), 0.1)
    expected = [reference.peak_signal_noise_ratio(x[None], y[None], data_range=1.0) for x, y in zip(a, b, strict=True)]
    assert torch.allclose(image_psnr(a, b), torch.stack(expected), atol=1e-4)
    assert (image_psnr(a, a) == PSNR_CAP).all()


def test_masked_psnr_sees_only_the_mask() -> None:
    a, b = pictures(1), pictures(1)
    b[:, :, :24] = 0
    mask = torch.zeros(1, 48, 48, dtype=torch.bool)
    mask[:, 24:] = True
    assert image_psnr(a, b, mask) == PSNR_CAP and image_psnr(a, b, ~mask) < image_psnr(a, b) < 20


def test_ssim_is_torchmetrics() -> None:
    a, b = pictures(), noisy(pictures(), 0.1)
    expected = [
        reference.structural_similarity_index_measure(x[None], y[None], data_range=1.0)
        for x, y in zip(a, b, strict=True)
    ]
    # torchmetrics averages over windows that reach over the border by reflection, Wang et al. do not
    padded = [torch.nn.functional.pad(x, (5, 5, 5, 5), mode="reflect") for x in (a, b)]
    assert torch.allclose(ssim(*padded), torch.stack(expected), atol=1e-4)
    assert torch.allclose(ssim(a, a), torch.ones(3), atol=1e-6)


def test_silhouettes() -> None:
    white = torch.ones(2, 3, 20, 20)
    white[0, 1, 5:15, 5:10] = 0.2
    white[1, 1, 5:15, 5:15] = 0.2
    assert silhouette(white).sum((1, 2)).tolist() == [50, 100]
    assert silhouette_iou(white[:1], white[1:]).item() == pytest.approx(0.5)
    assert silhouette_iou(torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)).item() == 1


def test_shift_tolerant_distance_grows_with_damage_and_says_its_name() -> None:
    perceptor = Perceptor("stlpips-alex")
    clean = pictures(2, 64)
    distances = [perceptor(noisy(clean, deviation), clean).mean().item() for deviation in (0, 0.05, 0.2, 0.5)]
    assert distances[0] == pytest.approx(0, abs=1e-6) and distances == sorted(distances) and distances[-1] > 0.2
    assert perceptor.name == "stlpips_alex" and "shift-tolerant" in perceptor.weights
    both = perceptor(noisy(clean, 0.2), clean)
    assert both[1] == pytest.approx(perceptor(noisy(clean, 0.2)[1:], clean[1:])[0].item(), rel=1e-4)


def test_lpips_without_its_weights_is_a_clear_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lpips-vgg needs its published weights.*stlpips-alex"):
        Perceptor("lpips-vgg")
    with pytest.raises(UserError, match="no LPIPS weights there"):
        Perceptor("lpips-alex", str(tmp_path))


def test_lpips_loads_published_layout_from_a_folder(tmp_path: Path) -> None:
    """Random tensors under the published names: only names and shapes are checked, no value is reported."""
    torchvision = pytest.importorskip("torchvision")
    backbone = torchvision.models.alexnet(weights=None)
    torch.save({k: v for k, v in backbone.state_dict().items() if k.startswith("features")}, tmp_path / "alexnet.pth")
    widths = (64, 192, 384, 256, 256)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    torch.save(heads, tmp_path / "alex.pth")
    perceptor = Perceptor("lpips-alex", str(tmp_path))
    clean = pictures(1, 64)
    assert perceptor.name == "lpips_alex"
    assert perceptor(clean, clean).item() == pytest.approx(0, abs=1e-6) and perceptor(noisy(clean, 0.2), clean) > 0


def test_clip_similarity_is_the_cosine() -> None:
    class Encoders:
        def image_features(self, frames: torch.Tensor) -> torch.Tensor:
            assert frames.min() >= -1 and frames.min() < -0.5
            return torch.nn.functional.normalize(frames.flatten(1), dim=-1)

    a, b = pictures(), noisy(pictures(), 0.2)
    features = [image_features(Encoders(), x) for x in (a, b)]  # type: ignore[arg-type]
    expected = torch.nn.functional.cosine_similarity((2 * a - 1).flatten(1), (2 * b - 1).flatten(1))
    assert torch.allclose(clip_similarity(*features), expected, atol=1e-5)


@given(count=st.integers(4, 12), shift=st.integers(0, 11), backwards=st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_wrong_order_is_found(count: int, shift: int, backwards: bool) -> None:
    truth = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(count))
    index = np.arange(count)
    order = ((count - 2 - index if backwards else index) + shift) % count
    views = truth[order] * 0.98
    found = best_alignment(pairwise_psnr(views, truth))
    if shift % count == 0 and not backwards:
        assert found == Alignment(0.0, 0, False) and found.ok
    else:
        assert not found.ok and found.gain > 5
        assert (found.shift, found.reversed) == (shift % count, backwards)
        assert ("backwards" if backwards else "forwards") in found.message


def test_blurred_views_in_the_right_order_are_fine() -> None:
    truth = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.avg_pool2d(truth, 5, 1, 2) * 0.5 + truth.mean(0) * 0.5
    assert best_alignment(pairwise_psnr(smooth, truth)).ok


def test_published_rows_are_the_papers_and_marked() -> None:
    rows = {row["subject"]: row for row in published_rows()}
    assert rows["SVD-MV"]["psnr"] == 16.83 and rows["SVD-MV"]["lpips"] == 0.14 and rows["SyncDreamer"]["clip_s"] == 0.88
    assert len(rows) == 6 and all(row["source"] != "measured" and row["protocol"] for row in rows.values())
