"""Micro trainings that learn in seconds, and the faults that their claims must find: a signal cut, a stage skipped.

In this world a clip is a random still picture n in one of four colours Q_k. The caption tells the colour, the
conditioning frame tells both. A linear filter can't read captions.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate
from toy_training import TOKENS, WIDTH, toy_context, toy_preset, write_toy_autoencoder

from evaluation.claims import Claim, share_claim
from evaluation.report.claims import training_claims
from svd.config import Preset, Sampling
from svd.diffusion.edm import KINDS
from svd.diffusion.guidance import Condition
from svd.latents.cache import LatentCache, write_index, write_shard
from svd.latents.loader import Draws, Examples
from svd.model.autoencoder import posterior_mean
from svd.model.formats.folders import checkpoint_hash, load_autoencoder, load_unet
from svd.model.unet import UNet
from svd.stage import Report
from svd.tasks.image_to_video import IMAGE_TO_VIDEO, build_from_frame
from svd.tasks.signals import ClipSignals, given
from svd.tasks.text_to_video import TEXT_TO_VIDEO
from svd.training import stages
from svd.training.samples import Preview

pytestmark = pytest.mark.slow

CLIPS, FRAMES, SIZE = 240, 4, 8
LATENT = (4, SIZE // 2, SIZE // 2)
SAMPLING = Sampling(steps=8, guidance=1.0, solver="dpmpp_2m", sigma_min=0.2, sigma_max=40)
PHASE = {"batch_size": 16, "height": SIZE, "width": SIZE, "frames": FRAMES, "p_mean": 1.5, "p_std": 1.3}


def colours() -> Tensor:
    """Q_k, (4, C, 1, 1): orthogonal, so that a network has to read the caption to know it at high noise."""
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    return 0.85 * signs.float()[:, :, None, None]


def preset(iterations: int, frames: int = FRAMES, rate: float = 2e-3) -> Preset:
    phase = {**PHASE, "frames": frames, "iterations": iterations, "learning_rate": rate}
    shared = {"optimizer": "muon", "ema_decay": 0.9, "warmup": 5, "decay": "cosine", "text_dropout": 0.1}
    rare = {"validate_every": 10_000, "checkpoint_every": 10_000, "sample_steps": 1}
    return toy_preset(SIZE, phases=[phase], validation_samples=64, **shared, **rare)


def write_world(folder: Path) -> None:
    """The latent cache of the micro world, with the autoencoder that its pictures went through."""
    draw = torch.Generator().manual_seed(1)
    write_toy_autoencoder(folder / "autoencoder")
    autoencoder = load_autoencoder(folder / "autoencoder")
    pictures = torch.randint(0, 256, (CLIPS, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8)
    with torch.no_grad():
        latents = posterior_mean(autoencoder.encode(pictures[:, None].float() / 127.5 - 1))
    which = torch.arange(CLIPS) % 4
    flicker = 0.1 * torch.randn(CLIPS, FRAMES, *LATENT, generator=draw)
    scale = float(latents.std()) / 0.5  # n has half the deviation of a clip
    means = latents - latents.mean() + scale * (colours()[which][:, None] + flicker)
    tokens = torch.randn(4, TOKENS, WIDTH, generator=draw)
    tensors = {
        "moments": torch.cat([means, torch.full_like(means, -12)], 2).bfloat16(),
        "image": tokens[which][:, :1].expand(-1, FRAMES, -1).half(),
        "frame": pictures,
        "text": tokens.half(),
    }
    write_shard(folder / "latents" / "shards" / "world.safetensors", tensors)
    rows = [_row(number) for number in range(CLIPS)]
    facts = {"scaling_factor": 1 / scale, "autoencoder": checkpoint_hash(folder / "autoencoder")}
    write_index(folder / "latents", rows, facts, torch.zeros(TOKENS, WIDTH))


def _row(number: int) -> dict[str, Any]:
    caption = {"captioner": "sidecar", "text": f"colour {number % 4}", "row": number % 4}
    about = {"geometry": f"{FRAMES}x{SIZE}x{SIZE}", "fps": 8.0, "motion_bucket": 100, "camera": "static"}
    split = "test" if number // 4 % 5 == 1 else "train"
    about |= {"split": split, "elevation": 0.0, "shard": "world.safetensors", "row": number, "captions": [caption]}
    return {"sample_id": f"{number:05d}", "clip_id": f"clip-{number}", **about}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world and the stages that every test starts from: image and video pretraining."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    stages.run_image_pretraining(toy_context(folder, "image-pretraining", preset(150, 1)))
    video(folder, "video-pretraining")
    return folder


def video(folder: Path, name: str) -> Report:
    image = folder / "outputs/image-pretraining"
    return stages.run_video_pretraining(toy_context(folder, name, preset(60), image_pretraining=image))


def finetuning(folder: Path, name: str) -> Report:
    before = folder / "outputs/video-pretraining"
    return stages.run_high_quality_finetuning(toy_context(folder, name, preset(40), video_pretraining=before))


def animation(folder: Path, name: str) -> Report:
    before = folder / "outputs/video-pretraining"
    return stages.run_image_to_video(toy_context(folder, name, preset(60), video_pretraining=before))


def shown(stage: str, report: Report) -> dict[str, bool]:
    return {claim.control: claim.shown for claim in training_claims(stage, report.metrics)}


LINEAR, START = "the best linear filter", "the network it started from"
CAPTION, FRAME = "its own, given another clip's caption", "its own, given another clip's frames"


def recognised(folder: Path, output: Path) -> Claim:
    """Whether clips sampled from test captions have the colour that the captions say."""
    cache = LatentCache(folder / "latents")
    phase = preset(1).video_pretraining.phases[0]
    draws = Draws(7, 1.5, 1.3, strata=8)
    examples = Examples(cache, cache.rows(phase, "test"), FRAMES, draws)
    batch = default_collate([examples[i] for i in range(len(examples))])
    shown = Preview(TEXT_TO_VIDEO, examples, load_autoencoder(folder / "autoencoder"), SAMPLING, KINDS["edm"])
    made = shown.generate(load_unet(output / "unet").eval(), shown.autoencoder, batch)
    answers = (made.mean((1, 3, 4)) @ colours().flatten(1).T).argmax(1)
    truth = [row["captions"][0]["row"] for row in examples.rows]
    right = [int(answer) == k for answer, k in zip(answers, truth, strict=True)]
    return share_claim("the caption's colour is seen", right, "chance", 0.25)


def test_what_was_trained_is_shown(world: Path) -> None:
    trained = json.loads((world / "outputs/video-pretraining/metrics.json").read_text())
    finetuned = finetuning(world, "high-quality-finetuning")
    claims = shown("high-quality-finetuning", finetuned)
    assert claims == {LINEAR: True, CAPTION: True, START: True}, (trained, finetuned.metrics)
    report = animation(world, "image-to-video")
    assert shown("image-to-video", report) == {LINEAR: True, FRAME: True, START: True}, report.metrics
    claim = recognised(world, world / "outputs/high-quality-finetuning")
    assert claim.shown and claim.value > 0.8, claim


def test_captions_that_are_cut_are_missed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = recognised(world, world / "outputs/video-pretraining")
    monkeypatch.setattr(Examples, "_text", lambda self, *arguments: self.cache.null_text)
    report = video(world, "video-without-captions")
    claim = recognised(world, world / "outputs/video-without-captions")
    assert not claim.shown and healthy.shown, (claim, healthy, report.metrics)
    assert not shown("video-pretraining", report)[CAPTION], report.metrics


def test_a_conditioning_frame_that_is_cut_is_missed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss ends below the start's all the same: captions and the CLIP token tell the colour alike."""

    def blind(signals: ClipSignals, unet: UNet) -> Condition:
        return build_from_frame(replace(signals, latents=torch.zeros_like(given(signals.latents))), unet)

    monkeypatch.setattr(stages, "IMAGE_TO_VIDEO", replace(IMAGE_TO_VIDEO, build=blind))
    report = animation(world, "image-to-video-blind")
    assert not shown("image-to-video", report)[FRAME], report.metrics


def test_a_shifted_noise_schedule_is_found(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training at a thirtieth of the noise that is validated."""
    right = Draws.sigma
    monkeypatch.setattr(Draws, "sigma", lambda self, i: right(self, i) / (1 if self.strata else 30))
    report = video(world, "video-shifted")
    assert not shown("video-pretraining", report)[LINEAR], report.metrics


def test_a_stage_that_is_skipped_is_missed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finetuning from fresh weights in place of the pretrained ones."""
    monkeypatch.setattr(stages, "carry_over", lambda source, target, origin: target)
    report = finetuning(world, "finetuning-without-pretraining")
    claims = shown("high-quality-finetuning", report)
    assert not claims[LINEAR] and not claims[START], report.metrics  # of captions it learns something by itself
