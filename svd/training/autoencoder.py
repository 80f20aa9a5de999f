"""The stage `autoencoder`: train one for the data at hand, or give a released one a temporal decoder.

1. Image phase (`iterations`): encoder and spatial decoder learn single frames with L1 + perceptual distance + KL.
   Released weights skip it.
2. Temporal phase (`temporal_iterations`, VideoLDM §3.1.1): the encoder is frozen, the whole decoder
   learns short clips with the same reconstruction loss and a temporal patch discriminator.
The stage's output is a model folder (`config.json`, weights) with `losses.csv` and `reconstructions.png`.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from svd.config import Preset
from svd.core.device import pick_device
from svd.model.autoencoder import (
    Autoencoder,
    add_temporal_decoder,
    fresh_autoencoder,
    posterior_mean,
)
from svd.model.formats.folders import load_autoencoder, save_autoencoder
from svd.model.formats.hub import VAE_FILES, resolve_weights
from svd.model.perceptual import Perceptual
from svd.stage import Report, StageContext, publish
from svd.training.autoencoder_phase import COLUMNS, Learner, PhaseName, Run
from svd.training.card_contents import autoencoder_card
from svd.training.frames import ClipPixels, split_rows
from svd.training.initialise import autoencoder_config
from svd.training.losses import ReconstructionLoss, flicker, reconstruction_psnr
from svd.training.model_card import write_card

PHASES: tuple[PhaseName, PhaseName] = ("image", "temporal")
HELD_OUT_CLIPS = 32
MEASURED_CLIPS = 64
SHOWN_CLIPS = 6
SHOWN_FRAMES = 6
LOG_EVERY = 10


def run(context: StageContext) -> Report:
    """Train (or load) the autoencoder, measure it on held-out clips and publish it.

    Metrics: psnr (dB), l1 and flicker on held-out clips before training, with the image decoder, and at the end.
    Raises UserError for an empty curation and for released weights that are missing or don't fit.
    """
    context.work.mkdir(parents=True, exist_ok=True)
    state = _prepare(context)
    metrics = state.metrics
    metrics |= evaluate(state, "_before", image_mode=True)
    _train(state, "image")
    if "psnr_image_decoder" not in metrics:
        metrics |= evaluate(state, "_image_decoder", image_mode=True)
    _train(state, "temporal")
    metrics |= evaluate(state, "", image_mode=False)
    scaling = scaling_factor(state)
    state.autoencoder.config = replace(state.autoencoder.config, scaling_factor=scaling)
    metrics |= {
        "scaling_factor": scaling,
        "training_clips": len(state.training),
        "held_out_clips": len(state.held_out),
    }
    _write(state)
    finished, report = context.work / "finished", Report(metrics, _summary(metrics))
    card = autoencoder_card(context, (row["clip_id"] for row in state.training.rows))
    write_card(finished, card, context, report)
    return publish(finished, context.output, report)


def _summary(metrics: dict[str, float]) -> str:
    return (
        f"PSNR {metrics['psnr_before']:.1f} -> {metrics['psnr']:.1f} dB on {metrics['held_out_clips']} held-out clips, "
        f"flicker {metrics['flicker_image_decoder']:.4f} (image decoder) -> {metrics['flicker']:.4f} (temporal decoder)"
    )


def _prepare(context: StageContext) -> Run:
    options, folder = context.preset.autoencoder, context.inputs["curation"]
    device = torch.device(pick_device())
    training, held_out = split_rows(folder)
    size = (options.frames, options.height, options.width)
    perceptual = Perceptual(options.perceptual, options.perceptual_weights) if options.perceptual_weight else None
    loss = ReconstructionLoss(
        perceptual, options.perceptual_weight, options.kl_weight, options.perceptual_frames, options.squared_weight
    ).to(device)
    return Run(
        context,
        device,
        initial_autoencoder(context.preset).to(device),
        loss,
        ClipPixels(folder, training, *size),
        ClipPixels(folder, held_out, *size),
    )


def initial_autoencoder(preset: Preset) -> Autoencoder:
    """Return the autoencoder before training, always temporal: the preset's released weights, or fresh ones."""
    section = preset.model.autoencoder
    if section.pretrained is None:
        return fresh_autoencoder(autoencoder_config(preset), preset.seed)
    path = resolve_weights(section.pretrained, filenames=VAE_FILES)
    released = load_autoencoder(path, dtype=torch.float32)
    return released if released.config.temporal_decoder else add_temporal_decoder(released)


@torch.no_grad()
def evaluate(state: Run, suffix: str, image_mode: bool) -> dict[str, float]:
    """Measure psnr (dB), l1 and flicker on held-out clips, named with `suffix`; the posterior's mean is decoded."""
    state.autoencoder.eval()
    real, fake = [], []
    clips = state.held_out.examples(HELD_OUT_CLIPS).split(4)
    for clip in tqdm(clips, desc="validation", unit="batch", leave=False, delay=2):
        clip = clip.to(state.device)
        real.append(clip)
        latents = posterior_mean(state.autoencoder.encode(clip))
        fake.append(state.autoencoder.decode(latents, image_mode=image_mode).float())
    a, b = torch.cat(real), torch.cat(fake)
    return {
        f"psnr{suffix}": reconstruction_psnr(a.flatten(0, 1), b.flatten(0, 1)),
        f"l1{suffix}": float((a - b).abs().mean()),
        f"flicker{suffix}": flicker(a, b) if a.shape[1] > 1 else 0.0,
    }


@torch.no_grad()
def scaling_factor(state: Run) -> float:
    """Return the preset's factor, or 1 / std of posterior draws of training clips (both variances added)."""
    given = state.context.preset.model.autoencoder.scaling_factor
    if given is not None:
        return given
    clips = state.training.examples(MEASURED_CLIPS)[:, :1]
    moments = torch.cat([state.autoencoder.encode(part.to(state.device)) for part in clips.split(8)])
    average, logvar = moments.double().chunk(2, dim=2)
    return float(1 / (average.var() + logvar.exp().mean()).sqrt())


def _train(state: Run, phase: PhaseName) -> None:
    """Train one phase from its last checkpoint on; do nothing when a later phase has begun."""
    options = state.options
    steps = options.iterations if phase == "image" else options.temporal_iterations
    if steps == 0:
        return
    learner = Learner(state, phase, steps)
    state.autoencoder.train()
    begun = learner.resume()
    with tqdm(range(begun, steps), initial=begun, total=steps, desc=f"autoencoder, {phase} phase") as bar:
        for step in bar:
            values = learner.step(step)
            state.rows.append([float(phase == "temporal"), step, *values.values()])
            if (step + 1) % LOG_EVERY == 0:
                bar.set_postfix(l1=f"{values['l1']:.4f}", refresh=False)
                named = {f"{phase}/{name}": value for name, value in values.items()}
                state.context.tracker.log_metrics(named, step)
            if (step + 1) % state.context.preset.compute.autoencoder.checkpoint_every == 0 or step + 1 == steps:
                learner.save(step + 1)


def _write(state: Run) -> None:
    """Write the finished folder: model, losses, reconstructions."""
    folder = state.context.work / "finished"
    shutil.rmtree(folder, ignore_errors=True)
    save_autoencoder(state.autoencoder.cpu(), folder)
    lines = [",".join(COLUMNS)]
    for phase, step, *values in state.rows:
        lines.append(",".join([PHASES[int(phase)], str(int(step)), *(f"{value:.6g}" for value in values)]))
    (folder / "losses.csv").write_text("\n".join(lines) + "\n")
    shown = reconstructions(state)
    Image.fromarray(shown).save(folder / "reconstructions.png")
    state.context.tracker.log_image("reconstructions", shown, state.options.temporal_iterations)


@torch.no_grad()
def reconstructions(state: Run) -> np.ndarray:
    """Return an image (H, W, 3) uint8: frames of held-out clips, each row above its reconstructions."""
    device = next(state.autoencoder.parameters()).device
    real = state.held_out.examples(SHOWN_CLIPS).to(device)
    fake = state.autoencoder.decode(posterior_mean(state.autoencoder.encode(real)))
    rows = torch.stack([real, fake.clamp(-1, 1)], dim=1)[:, :, :SHOWN_FRAMES]
    clips, two, frames, channels, height, width = rows.shape
    grid = rows.permute(0, 1, 4, 2, 5, 3).reshape(clips * two * height, frames * width, channels)
    return ((grid + 1) * 127.5).round().byte().cpu().numpy()
