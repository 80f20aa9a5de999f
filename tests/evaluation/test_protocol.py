"""Protocols: stable hashes that see every choice, exact pictures, and guards against wrong input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evaluation.frechet.protocol import (
    I3D_TORCHSCRIPT_SHA256,
    TRANSNETV2,
    Crop,
    EvalProtocol,
    Resize,
    named_protocols,
    resize,
)


def protocol(**changes) -> EvalProtocol:
    return dataclasses.replace(
        EvalProtocol("mine", "fixture", TRANSNETV2, (Resize(24, 40, antialias=True), Crop(24, 32)), (), 4), **changes
    )


def test_digests_are_stable_over_runs_and_versions() -> None:
    """Pinned: a change of these strings makes every stored score incomparable, so it must be deliberate."""
    assert {name: p.digest() for name, p in named_protocols().items()} == {
        "svd_ucf101_paper": "86dbf491146e",
        "styleganv_2048_16f": "cc06472bb5b6",
        "tf_original": "41ad501b754b",
        "cdfvd_videomae": "3eef5970d2d6",
        "junyaohu_crop": "230063b3b8b3",
    }


def test_every_choice_changes_the_digest_and_the_name_does_not() -> None:
    changes = [
        {"dataset": "other"},
        {"net": dataclasses.replace(TRANSNETV2, sha256="0" * 64)},
        {"steps": (Resize(24, 40), Crop(24, 32))},
        {"real_steps": (Crop(24, 32),)},
        {"frames": 5},
        {"fps": 25.0},
        {"prompt": "caption"},
        {"start": "middle"},
        {"rounding": "truncate"},
        {"real": 10},
        {"generated": 10},
        {"ddof": 1},
        {"solver": "sqrtm"},
    ]
    assert {f.name for f in dataclasses.fields(EvalProtocol)} == {"name"} | {key for c in changes for key in c}
    digests = {protocol(**change).digest() for change in changes} | {protocol().digest()}
    assert len(digests) == len(changes) + 1
    assert protocol(name="another").digest() == protocol().digest()


def test_what_is_changed_is_said_in_the_name() -> None:
    paper = named_protocols()["svd_ucf101_paper"]
    assert paper.changed(frames=16, fps=25.0) is paper
    changed = paper.changed(frames=8, fps=12.5, net=TRANSNETV2).changed(steps=(), generated=2048)
    assert changed.name == "svd_ucf101_paper[frames=8,fps=12.5,net=transnetv2,steps=none,generated=2048]"
    assert (changed.frames, changed.steps, changed.real_steps) == (8, (), paper.real_steps)
    assert changed.with_weights("a" * 64).name == changed.name, "this network has no file of its own"
    assert paper.with_weights(I3D_TORCHSCRIPT_SHA256) == paper
    assert paper.with_weights("a" * 64).name == "svd_ucf101_paper[net=i3d:aaaaaaaa]"
    sizes = paper.changed(steps=(Resize(64, 96), Crop(64, 86)))
    assert sizes.name == "svd_ucf101_paper[steps=64x96>64x86]"


def test_paper_protocol_is_the_papers() -> None:
    paper = named_protocols()["svd_ucf101_paper"]
    assert (paper.frames, paper.fps, paper.prompt) == (16, 25.0, "class")
    assert (paper.real, paper.generated) == (13_320, 13_320)
    clips = torch.randint(0, 256, (1, 16, 3, 320, 576), dtype=torch.uint8)
    assert paper.detector_input(paper.images(clips, real=False)).shape == (1, 16, 3, 240, 320)
    real = torch.randint(0, 256, (1, 16, 3, 240, 320), dtype=torch.uint8)
    assert torch.equal(paper.detector_input(paper.images(real, real=True)), real)


def test_cdfvd_truncates_at_256_and_resizes_without_rounding() -> None:
    """cd-fvd's loader: short side to 256 with antialiasing, centre crop, `(255 v).byte()`; then 224 in float."""
    cdfvd = named_protocols()["cdfvd_videomae"]
    clips = torch.randint(0, 256, (1, 16, 3, 240, 320), dtype=torch.uint8)
    frames = clips[0].float() / 255
    scaled = torch.nn.functional.interpolate(frames, (256, 342), mode="bilinear", antialias=True)
    stored = (scaled[..., 43:299] * 255).byte()
    expected = torch.nn.functional.interpolate(stored.float(), (224, 224), mode="bilinear")
    seen = cdfvd.detector_input(cdfvd.images(clips, real=True))[0]
    assert seen.dtype == torch.float32 and (seen != seen.round()).float().mean() > 0.5
    assert (seen - expected).abs().mean() < 0.02 and cdfvd.ddof == 0


def test_antialiased_resize_equals_pillow() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    ours = resize(torch.from_numpy(picture).permute(2, 0, 1)[None, None].float(), Resize(24, 40, antialias=True))
    pillow = np.asarray(Image.fromarray(picture).resize((40, 24), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(ours[0, 0].permute(1, 2, 0).numpy() - pillow).max() <= 1.0


def test_legacy_resize_has_no_half_pixel_centres() -> None:
    """TensorFlow 1: output i takes source i · in / out, so halving takes every second pixel, and borders repeat."""
    row = torch.arange(8.0)[None, None, None, None].expand(1, 1, 1, 8, 8)
    assert resize(row, Resize(4, 4, legacy=True))[0, 0, 0, 0].tolist() == [0, 2, 4, 6]
    assert resize(row, Resize(8, 16, legacy=True))[0, 0, 0, 0].tolist()[:4] == [0, 0.5, 1, 1.5]
    assert resize(row, Resize(8, 16, legacy=True))[0, 0, 0, 0].tolist()[-2:] == [7, 7]


@given(st.integers(10, 90), st.integers(10, 90))
def test_cover_covers_and_keeps_the_aspect_ratio(height: int, width: int) -> None:
    target = Resize(24, 32, cover=True).target(height, width)
    assert (target[0] >= 24 and target[1] >= 32 and 24 in target[:1] + target[1:]) or 32 in target
    assert abs(target[0] / target[1] - height / width) < 0.05 * height / width + 0.05


def test_short_side_then_crop_is_another_picture_than_squashing() -> None:
    clips = torch.randint(0, 256, (1, 16, 3, 240, 320), dtype=torch.uint8)
    named = named_protocols()
    cropped = named["junyaohu_crop"].images(clips, real=True)
    squashed = named["tf_original"].images(clips, real=True)
    assert cropped.shape == squashed.shape == (1, 16, 3, 224, 224)
    assert (cropped - squashed).abs().mean() > 20


def test_rounding_is_half_to_even_or_truncation() -> None:
    pixels = torch.tensor([0.5, 1.5, 2.49, 2.51, 254.9]).reshape(1, 1, 1, 1, 5).expand(1, 1, 3, 1, 5)
    assert protocol().rounded(pixels)[0, 0, 0, 0].tolist() == [0, 2, 2, 3, 255]
    assert protocol(rounding="truncate").rounded(pixels)[0, 0, 0, 0].tolist() == [0, 1, 2, 2, 254]


def test_frames_of_a_real_clip_depend_on_its_name_alone() -> None:
    at_25 = protocol(frames=4, fps=8.0)
    numbers = at_25.real_frames("A/v_A_g01_c01.avi", 48, 25.0)
    assert numbers == at_25.real_frames("A/v_A_g01_c01.avi", 48, 25.0)
    assert np.diff(numbers).tolist() == [3, 3, 3] and numbers[0] >= 0 and numbers[-1] < 48
    starts = {at_25.real_frames(f"clip {i}", 48, 25.0)[0] for i in range(60)}
    assert len(starts) > 20
    assert protocol(frames=4, fps=25.0).real_frames("x", 4, 29.97) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="needs 10"):
        at_25.real_frames("x", 9, 25.0)


def test_a_generated_clip_is_scored_from_its_first_frames() -> None:
    """The paper and StyleGAN-V score frames 0 to 15 of what a model makes, whatever rate the file claims."""
    assert protocol(frames=16, fps=8.0).generated_frames("made.mp4", 25) == list(range(16))
    with pytest.raises(ValueError, match=r"made\.mp4: 14 frames, protocol mine needs 16"):
        protocol(frames=16).generated_frames("made.mp4", 14)


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (torch.rand(1, 4, 3, 24, 40), "look like"),
        (torch.ones(1, 4, 3, 24, 40, dtype=torch.uint8), "look like"),
        (torch.full((1, 4, 3, 24, 40), float("nan")), "NaN"),
        (torch.rand(1, 4, 3, 24, 40) * 300, "expected 0..255"),
        (torch.rand(1, 4, 3, 24, 40) * 255 - 100, "expected 0..255"),
        (torch.rand(1, 5, 3, 24, 40) * 255, "5 frames"),
        (torch.rand(1, 4, 24, 40, 3) * 255, "shape"),
        (torch.rand(4, 3, 24, 40) * 255, "shape"),
    ],
)
def test_wrong_clips_are_refused(clips: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        protocol().images(clips, real=False)


def test_black_clips_and_small_pictures() -> None:
    black = torch.zeros(1, 4, 3, 24, 40, dtype=torch.uint8)
    assert protocol().images(black, real=False).shape == (1, 4, 3, 24, 32)
    with pytest.raises(ValueError, match="can't crop"):
        protocol(steps=(Crop(48, 48),)).images(black, real=False)
