"""The module: objective, what trains, learning rate, clipping, conditioning of every task, averaging of the weights."""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch
from torch.utils.data import default_collate
from toy_training import toy_context, toy_preset

from svd.config import Phase, Sampling
from svd.config.load import ConfigError, load_preset
from svd.core.errors import UserError
from svd.diffusion import edm
from svd.latents.cache import LatentCache
from svd.latents.loader import Batch, Draws, Examples
from svd.model.autoencoder import Autoencoder
from svd.model.formats.folders import load_autoencoder
from svd.model.unet import UNet, UNetConfig
from svd.tasks.base import Task
from svd.tasks.image_to_video import IMAGE_TO_VIDEO
from svd.tasks.interpolation import INTERPOLATION
from svd.tasks.multiview import MULTIVIEW
from svd.tasks.signals import dropped, micro_conditioning
from svd.tasks.text_to_video import IMAGE, TEXT_TO_VIDEO
from svd.training.ema import Ema
from svd.training.initialise import carry_over, fresh_unet, unet_config, with_checkpointing
from svd.training.module import TEMPORAL_PARTS, Diffusion, learning_rate_factor, select_parameters
from svd.training.samples import Preview

TASKS = (IMAGE, TEXT_TO_VIDEO, IMAGE_TO_VIDEO, INTERPOLATION, MULTIVIEW)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[LatentCache, Autoencoder]:
    context = toy_context(tmp_path_factory.mktemp("toy"), "module")
    return LatentCache(context.inputs["latents"]), load_autoencoder(context.inputs["autoencoder"])


def unet_of(task: Task, seed: int = 0) -> UNet:
    unet = fresh_unet(unet_config(toy_preset(), task, (8, 8)), seed, "test")
    torch.manual_seed(1)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    return unet


def batch_of(cache: LatentCache, task: Task, **draws: object) -> Batch:
    frames = 1 if task is IMAGE else 4
    chosen = Draws(3, 0.0, 1.0, pixels=task.pixels, **draws)  # type: ignore[arg-type]
    examples = Examples(cache, cache.index.rows, frames, chosen)
    return default_collate([examples[k] for k in range(3)])


def text_ids(batch: Batch) -> torch.Tensor:
    ids = micro_conditioning(2, len(batch["fps"]), fps=batch["fps"], motion_bucket=batch["motion_bucket"])
    assert ids is not None
    return ids


def module_of(task: Task, autoencoder: Autoencoder, **training: object) -> Diffusion:
    config = toy_preset(**training).video_pretraining
    unet = unet_of(task)
    return Diffusion(unet, task, config, config.phases[0], autoencoder, lambda u: select_parameters(u, task, "all"))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_loss_is_the_weighted_denoising_error(task: Task, parts: tuple[LatentCache, Autoencoder]) -> None:
    cache, autoencoder = parts
    batch, module = batch_of(cache, task), module_of(task, autoencoder)
    with torch.no_grad():
        losses = module.losses(batch)
        condition = task.condition(batch, module.unet, autoencoder)
        x = batch["latents"] + edm.expand(batch["sigma"], batch["latents"]) * batch["noise"]
        c_skip, c_out, c_in, c_noise = (edm.expand(s, x) for s in edm.scalings(batch["sigma"]))
        given = x * c_in if condition.concat is None else torch.cat([x * c_in, condition.concat], 2)
        raw = module.unet(given, c_noise.flatten(), condition.context, condition.ids)
        error = (c_skip * x + c_out * raw - batch["latents"]).square().flatten(1).mean(1)
    assert losses.shape == (3,)
    torch.testing.assert_close(losses, error * edm.weighting(batch["sigma"]), rtol=2e-4, atol=1e-5)


def test_images_of_a_joint_batch_train_the_image_model_alone(parts: tuple[LatentCache, Autoencoder]) -> None:
    """Their loss is that of image mode, the clips' that of a batch of clips, and no temporal layer learns from them."""
    cache, autoencoder = parts
    module = module_of(TEXT_TO_VIDEO, autoencoder)
    module.configure_model()
    for parameter in module.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch = batch_of(cache, TEXT_TO_VIDEO, image_share=0.7)
    images = batch["image_only"]
    assert images.tolist() == [True, False, False]
    losses = module.losses(batch)
    as_clips = module.losses({**batch, "image_only": torch.zeros_like(images)})
    image_mode = functools.partial(module.unet.forward, image_mode=True)
    x = batch["latents"] + edm.expand(batch["sigma"], batch["latents"]) * batch["noise"]
    scale = edm.scalings(batch["sigma"])
    predicted = image_mode(x * edm.expand(scale.c_in, x), scale.c_noise, batch["text"], text_ids(batch))
    target = edm.v_target(batch["latents"], batch["noise"], batch["sigma"])
    as_images = (predicted - target).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, torch.where(images, as_images, as_clips))
    assert (as_images - as_clips).abs().min() > 1e-4
    losses[0].backward()
    for name, parameter in module.unet.named_parameters():
        if any(word in name for word in TEMPORAL_PARTS):
            assert parameter.grad is not None and not parameter.grad.any(), name
    module.unet.zero_grad()
    losses = module.losses(batch)
    losses.mean().backward()
    factors = [p.grad for name, p in module.unet.named_parameters() if name.endswith("mix_factor")]
    assert factors and all(gradient.any() for gradient in factors)


@pytest.mark.parametrize("task", TASKS[1:], ids=lambda task: task.name)
def test_every_trainable_parameter_gets_a_gradient(task: Task, parts: tuple[LatentCache, Autoencoder]) -> None:
    cache, autoencoder = parts
    module = module_of(task, autoencoder)
    module.configure_model()
    for parameter in module.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    module.losses(batch_of(cache, task)).mean().backward()
    without = [n for n, p in module.unet.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # One number a channel that the following normalisation takes away again.
    assert [name for name in without if "bias" not in name] == []
    frozen = [name for name, p in module.unet.named_parameters() if not p.requires_grad]
    assert all(re.search(r"transformer_blocks\.0\.(attn2\.to_[qk]|norm2)\.", name) for name in frozen)
    assert bool(frozen) == task.one_token


def test_what_one_token_leaves_without_effect_is_frozen_at_full_size() -> None:
    """50,389,760 parameters: queries, keys and norms of the cross-attention of 16 spatial and 16 temporal blocks."""
    with torch.device("meta"):
        unet = UNet(UNetConfig(in_channels=8, ids=3))
    select_parameters(unet, IMAGE_TO_VIDEO, "all")
    frozen = {name: p.numel() for name, p in unet.named_parameters() if not p.requires_grad}
    assert sum(frozen.values()) == 50_389_760 and len(frozen) == 32 * 4
    select_parameters(unet, TEXT_TO_VIDEO, "all")
    assert all(p.requires_grad for p in unet.parameters())


def test_ids_are_those_of_generation(parts: tuple[LatentCache, Autoencoder]) -> None:
    cache, autoencoder = parts
    batch = batch_of(cache, MULTIVIEW)
    ids = MULTIVIEW.condition(batch, unet_of(MULTIVIEW), autoencoder).ids
    for k in range(3):
        fps, bucket, sigma, elevation = (
            batch[key][k].item() for key in ("fps", "motion_bucket", "conditioning_sigma", "elevation")
        )
        expected = micro_conditioning(4, 1, fps=fps, motion_bucket=bucket, cond_aug=sigma, elevation_degrees=elevation)
        torch.testing.assert_close(ids[k : k + 1], expected)


def test_dropping_zeroes_image_and_latent_and_empties_the_text(parts: tuple[LatentCache, Autoencoder]) -> None:
    cache, autoencoder = parts
    batch = batch_of(cache, IMAGE_TO_VIDEO)
    signals = IMAGE_TO_VIDEO.observe(batch, autoencoder)
    condition = IMAGE_TO_VIDEO.build(dropped(signals, cache.null_text), unet_of(IMAGE_TO_VIDEO))
    assert not condition.context.any()
    assert not condition.concat.any()
    assert dropped(signals, cache.null_text).text.equal(cache.null_text.expand(3, -1, -1))
    kept = IMAGE_TO_VIDEO.condition(batch, unet_of(IMAGE_TO_VIDEO), autoencoder)
    assert kept.concat.shape == batch["latents"].shape
    assert kept.concat[:, 0].equal(kept.concat[:, -1])


def test_time_embedding_alone_trains_in_the_first_phase() -> None:
    unet = unet_of(TEXT_TO_VIDEO)
    select_parameters(unet, TEXT_TO_VIDEO, "time-embedding")
    trained = {name.split(".")[0] for name, p in unet.named_parameters() if p.requires_grad}
    assert trained == {"time_embedding"}
    select_parameters(unet, TEXT_TO_VIDEO, "temporal")
    trained = [name for name, p in unet.named_parameters() if p.requires_grad]
    assert trained and all("tempor" in name or "time_pos" in name or "time_mixer" in name for name in trained)


def test_learning_rate_warms_up_and_decays() -> None:
    config = toy_preset(warmup=4, decay="cosine").video_pretraining
    rates = [learning_rate_factor(step, config, 10) for step in range(11)]
    assert rates[0] == pytest.approx(0.25)
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0.0, abs=1e-9)
    assert learning_rate_factor(99, toy_preset(decay="none").video_pretraining, 10) == 1.0


def test_gradients_are_clipped_by_their_norm(parts: tuple[LatentCache, Autoencoder]) -> None:
    cache, autoencoder = parts
    module = module_of(TEXT_TO_VIDEO, autoencoder, clip_norm=1e-3)
    module.configure_model()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    (module.training_step(batch_of(cache, TEXT_TO_VIDEO), 0)["loss"] * 100).backward()
    module.configure_gradient_clipping(optimizer)
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for p in module.unet.parameters() if p.grad is not None))
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    assert float(module.gradient_norm) > 1e-3


def test_average_follows_its_formula_and_swaps_back() -> None:
    model = torch.nn.Linear(3, 2)
    average = Ema(model, decay=0.5)
    expected = model.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    raw = model.weight.detach().clone()
    with average.swapped():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert model.weight.equal(raw)


def test_averaging_every_k_steps_takes_the_power_of_the_decay() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = Ema(model, decay=0.9, every=2)
    start = model.weight.item()
    with torch.no_grad():
        model.weight.fill_(start + 1)
    average.update(1)
    assert average.get_parameter("weight").item() == start
    average.update(2)
    assert average.get_parameter("weight").item() == pytest.approx(start + 1 - (2 / 11) ** 2)


def test_carrying_over_leaves_the_function_unchanged(parts: tuple[LatentCache, Autoencoder]) -> None:
    cache, autoencoder = parts
    source = unet_of(TEXT_TO_VIDEO)
    torch.nn.init.normal_(source.add_embedding.linear_2.weight, std=0.1)
    target = carry_over(source, unet_of(IMAGE_TO_VIDEO, seed=5), "source")
    batch = batch_of(cache, IMAGE_TO_VIDEO)
    concat = IMAGE_TO_VIDEO.condition(batch, target, autoencoder).concat
    ids = torch.tensor([[5.0, 100.0, 0.05]]).expand(3, -1)
    x, noise = batch["latents"], torch.zeros(3)
    with torch.no_grad():
        before = source(x, noise, batch["text"], ids[:, :2])
        after = target(torch.cat([x, concat], 2), noise, batch["text"], ids)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_an_image_model_lives_on_in_the_video_model(parts: tuple[LatentCache, Autoencoder]) -> None:
    cache, _ = parts
    image = unet_of(IMAGE)
    video = carry_over(image, unet_of(TEXT_TO_VIDEO, seed=5), "image")
    batch = batch_of(cache, IMAGE)
    with torch.no_grad():
        before = image(batch["latents"], torch.zeros(3), batch["text"])
        ids = torch.tensor([[5.0, 100.0]]).expand(3, -1)
        after = video(batch["latents"], torch.zeros(3), batch["text"], ids, image_mode=True)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", ["fixed", "learned", "learned_with_images"])
def test_the_preset_chooses_the_mixers(mixer: str, parts: tuple[LatentCache, Autoencoder]) -> None:
    """Carrying weights over to other mixers changes nothing but what trains."""
    cache, _ = parts
    source = unet_of(TEXT_TO_VIDEO)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 1.0)
    model = toy_preset().model
    unet = model.unet.model_copy(update={"mixer": mixer})
    preset = toy_preset().model_copy(update={"model": model.model_copy(update={"unet": unet})})
    config = unet_config(preset, TEXT_TO_VIDEO, (8, 8))
    assert config.mixer == mixer
    target = carry_over(source, fresh_unet(config, 0, "test"), "source")
    back = carry_over(target, unet_of(TEXT_TO_VIDEO, seed=5), "target")
    trained = [name for name, _ in target.named_parameters() if name.endswith("mix_factor")]
    assert bool(trained) == (mixer != "fixed")
    batch = batch_of(cache, TEXT_TO_VIDEO)
    with torch.no_grad():
        first, *others = (
            unet(batch["latents"], torch.zeros(3), batch["text"], text_ids(batch)) for unet in (source, target, back)
        )
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-5)


def test_images_need_mixers_that_know_them() -> None:
    phases = [{**phase.model_dump(), "image_share": 0.2} for phase in load_preset("tiny").video_pretraining.phases]
    unet = {**load_preset("tiny").model.unet.model_dump(), "mixer": "learned"}
    with pytest.raises(ConfigError, match=r"video_pretraining.phases.0.image_share' needs 'model.unet.mixer"):
        load_preset("tiny", {"video_pretraining.phases": phases, "model.unet": unet})


def test_unfitting_weights_are_named() -> None:
    small = unet_of(TEXT_TO_VIDEO)
    config = unet_config(toy_preset(), TEXT_TO_VIDEO, (8, 8))
    wide = UNet(type(config)(**{**config.__dict__, "block_out_channels": (64, 64)}))
    with pytest.raises(UserError, match=r"some/unet: .* 'model.unet'"):
        carry_over(small, wide, "some/unet")


def test_recomputation_changes_no_gradient(parts: tuple[LatentCache, Autoencoder]) -> None:
    cache, autoencoder = parts
    batch, gradients = batch_of(cache, TEXT_TO_VIDEO), []
    for mode in ("none", "all"):
        module = module_of(TEXT_TO_VIDEO, autoencoder)
        module.unet = with_checkpointing(module.unet, mode)
        module.losses(batch).mean().backward()
        gradients.append({n: p.grad for n, p in module.unet.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_phase_sizes_must_be_cached() -> None:
    phase = Phase(iterations=1, batch_size=1, height=24, width=16, frames=1, p_mean=0, p_std=1, learning_rate=1)
    with pytest.raises(ConfigError, match=r"latents\.geometries"):
        toy_preset(phases=[phase.model_dump()])


def test_previews_of_discrete_models_keep_to_their_levels(parts: tuple[LatentCache, Autoencoder]) -> None:
    """Their first level is the schedule's highest, not 700, which the network could not tell from it."""
    cache, autoencoder = parts
    draws = Draws(3, 0.0, 1.0, objective="discrete-v", strata=8)
    examples = Examples(cache, cache.index.rows, 4, draws)
    unet, levels = unet_of(TEXT_TO_VIDEO), []
    unet.register_forward_pre_hook(lambda module, arguments: levels.append(arguments[1][0].item()))
    films = Preview(TEXT_TO_VIDEO, examples, autoencoder, Sampling(steps=3), "v").films(unet)
    assert films[0][0].shape == films[0][1].shape == (4, 16, 16, 3)
    assert levels[0] == 999 and 100 < levels[1] < 900 and levels[2] == 0
