"""The conditioning of a training batch is the conditioning of the request that describes the same clips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_models import toy_autoencoder, toy_unet

from svd.config import Sampling
from svd.diffusion.guidance import Condition
from svd.generation import Models, image_to_video, interpolate, multiview, pipeline, text_to_video
from svd.generation.interpolating import _window_seed
from svd.model.autoencoder import posterior_mean
from svd.model.encoders import Encoders, ImageEncoder, TextEncoder
from svd.model.formats.clip import build_clip, toy_config
from svd.tasks.base import Task
from svd.tasks.registry import TASKS
from svd.tasks.signals import dropped

FRAMES, HEIGHT, WIDTH, SEED = 5, 16, 24, 7
FPS, BUCKET, NOISE, ELEVATION = 12.0, 100.0, 0.125, 12.5
QUICK = Sampling(steps=1, guidance=2.0)
COMMON: dict[str, Any] = {"sampling": QUICK, "seed": SEED, "motion_bucket": BUCKET, "progress": False}
SIZE: dict[str, Any] = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": FPS}


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    torch.manual_seed(0)
    clip = build_clip(toy_config(16, 32), "test").eval().requires_grad_(False)
    return Encoders(TextEncoder(clip), ImageEncoder(clip.visual), "toy")


def models_of(task: Task, encoders: Encoders) -> Models:
    unet = toy_unet(in_channels=task.in_channels(), ids=task.ids, learned_mask=task.learned_mask, mask_size=(8, 12))
    autoencoder = toy_autoencoder().requires_grad_(False)
    autoencoder.config = type(autoencoder.config)(**{**autoencoder.config.__dict__, "scaling_factor": 0.5})
    return Models(unet.requires_grad_(False), autoencoder, encoders, torch.device("cpu"), torch.float32)


def images(count: int) -> Tensor:
    return torch.rand(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def request(models: Models, task: Task) -> None:
    """What a user asks for, through the public function of the task."""
    if task.name == "text-to-video":
        text_to_video(models, ["a red ball"], **SIZE, **COMMON)
    elif task.name == "image-to-video":
        image_to_video(models, images(1), cond_aug=NOISE, **SIZE, **COMMON)
    elif task.name == "multi-view":
        multiview(models, images(1), ELEVATION, FRAMES, cond_aug=NOISE, fps=FPS, **COMMON)
    else:
        interpolate(models, images(2), fps=FPS / 4, cond_aug=NOISE, **COMMON)


def batch_of(models: Models, task: Task) -> dict[str, Tensor]:
    """The training batch that a loader would draw for these clips."""
    signed, shape = images(2) * 2 - 1, (1, FRAMES, 4, HEIGHT // 2, WIDTH // 2)
    latents, one = torch.zeros(shape), torch.ones(1)
    embeddings = models.encoders.image(signed)
    embedded = torch.zeros(1, FRAMES, embeddings.shape[1])
    embedded[0, 0], embedded[0, -1] = embeddings[0], embeddings[0 if task.name == "multi-view" else 1]
    latents[0, [0, -1]] = posterior_mean(models.autoencoder.encode(signed[None]))[0] * 0.5
    window = torch.Generator().manual_seed(_window_seed(SEED, 0, 0))
    return {
        "latents": latents,
        "scaling_factor": one * 0.5,
        "text": models.encoders.text(["a red ball"]),
        "image": embedded,
        "frame": signed[:1],
        "frame_noise": torch.randn(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(SEED))[None],
        "latent_noise": torch.randn(2, *shape[2:], generator=window)[None],
        "conditioning_sigma": one * NOISE,
        "fps": one * FPS,
        "motion_bucket": one * BUCKET,
        "elevation": one * ELEVATION,
        "keep_image": one,
        "keep_concat": one,
    }


def assert_same(asked: Condition, trained: Condition) -> None:
    for name in ("context", "ids", "concat", "time_context", "image_only"):
        one, other = getattr(asked, name), getattr(trained, name)
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other.expand_as(one), rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_request_conditions_as_its_training_batch(
    task: Task, encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, seen = models_of(task, encoders), []

    def denoise(unet: object, noise: Tensor, cond: Condition, uncond: Condition, *others: object) -> Tensor:
        seen.append((cond, uncond))
        return noise

    monkeypatch.setattr(pipeline, "denoise_latents", denoise)
    request(models, task)
    (cond, uncond), null = seen[0], encoders.text([""])[0]
    batch = batch_of(models, task)
    assert_same(cond, task.condition(batch, models.unet, models.autoencoder))
    # The unconditional branch is what dropout leaves in training.
    assert_same(uncond, task.build(dropped(task.observe(batch, models.autoencoder), null), models.unet))
    zero = torch.zeros(1)
    left = {**batch, "keep_image": zero, "keep_concat": zero, "text": null[None]}
    assert_same(uncond, task.condition(left, models.unet, models.autoencoder))
    assert not torch.equal(cond.context, uncond.context)
