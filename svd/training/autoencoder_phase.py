"""One phase of the autoencoder's training as a resumable loop body (VideoLDM §3.1.1 for the temporal phase)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from svd.config import AutoencoderTraining
from svd.core.files import atomic_file
from svd.latents.loader import generator
from svd.model.autoencoder import Autoencoder, sample_posterior
from svd.stage import StageContext
from svd.training.frames import ClipPixels
from svd.training.losses import PatchDiscriminator, ReconstructionLoss, adaptive_weight, hinge
from svd.training.muon import Muon

PhaseName = Literal["image", "temporal"]
COLUMNS = (
    "phase",
    "step",
    "loss",
    "l1",
    "squared",
    "perceptual",
    "kl",
    "generator",
    "adaptive_weight",
    "discriminator",
)
BETAS = (0.5, 0.9)  # of Adam, as in the reference's autoencoder configurations
WARMUP = 10


@dataclass
class Run:
    """The state of a training. rows: losses per step, in the order of COLUMNS; metrics: those found so far."""

    context: StageContext
    device: torch.device
    autoencoder: Autoencoder
    loss: ReconstructionLoss
    training: ClipPixels
    held_out: ClipPixels
    rows: list[list[float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def options(self) -> AutoencoderTraining:
        """The section of the preset."""
        return self.context.preset.autoencoder

    @property
    def checkpoint(self) -> Path:
        """Where work in progress is kept."""
        return self.context.work / "checkpoint.pt"


class Learner:
    """Optimises one phase. All randomness is a function of (seed, step), so a resumed run equals an undisturbed one."""

    def __init__(self, state: Run, phase: PhaseName, steps: int) -> None:
        self.state, self.phase, self.steps = state, phase, steps
        options, autoencoder = state.options, state.autoencoder
        torch.manual_seed(state.context.preset.seed + (phase == "temporal"))
        self.parameters = list(trainable(autoencoder, phase, options.train_encoder))
        self.optimizer = self._optimizer()
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.discriminator = PatchDiscriminator(width=options.discriminator_width).to(state.device)
        self.judge_optimizer = torch.optim.Adam(self.discriminator.parameters(), options.learning_rate, betas=BETAS)
        self.learns_encoder = phase == "image" and options.train_encoder

    def _optimizer(self) -> torch.optim.Optimizer:
        options, autoencoder = self.state.options, self.state.autoencoder
        if options.optimizer == "adam" or self.phase == "temporal":
            return torch.optim.Adam(self.parameters, self._rate(), betas=BETAS)
        ends = [autoencoder.encoder.conv_in.weight, autoencoder.quant_conv.weight, autoencoder.decoder.conv_out.weight]
        return Muon(self.parameters, ends, options.matrix_rate, options.learning_rate, betas=BETAS)

    def _rate(self) -> float:
        options = self.state.options
        return options.learning_rate if self.phase == "image" else options.temporal_rate or options.learning_rate

    def step(self, step: int) -> dict[str, float]:
        """Take one optimisation step; return its losses."""
        state, options = self.state, self.state.options
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            # A tenth at the end: the last steps average out the noise of small batches.
            group["lr"] = rate * min(1, (step + 1) / WARMUP) * (1 - 0.9 * step / self.steps)
        frames = 1 if self.phase == "image" else options.frames
        clips = max(1, options.batch_size // frames)
        crop = options.crop if self.phase == "image" else None
        real = state.training.batch(state.context.preset.seed, step, clips, frames, crop).to(state.device)
        with autocast(options.precision, state.device):
            moments, fake = self._reconstruct(real, step)
        fake = fake.float()
        parts = state.loss(real, fake, moments.float() if self.learns_encoder else None)
        total, adversarial, weight = parts.total, parts.total.new_zeros(()), parts.total.new_zeros(())
        if self.phase == "temporal" and step >= options.discriminator_start:
            adversarial, weight = self._adversarial(parts.total, fake)
            total = total + weight * adversarial
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        judged = self._judge(real, fake.detach()) if self.phase == "temporal" else 0.0
        return {
            "loss": total.item(),
            "l1": parts.l1.item(),
            "squared": parts.squared.item(),
            "perceptual": parts.perceptual.item(),
            "kl": parts.kl.item(),
            "generator": adversarial.item(),
            "adaptive_weight": weight.item(),
            "discriminator": judged,
        }

    def _reconstruct(self, real: Tensor, step: int) -> tuple[Tensor, Tensor]:
        autoencoder = self.state.autoencoder
        with torch.set_grad_enabled(self.learns_encoder):
            moments = autoencoder.encode(real)
        source = generator(self.state.context.preset.seed, step, f"autoencoder-{self.phase}")
        latents = sample_posterior(moments, source)
        return moments, autoencoder.decode(latents, image_mode=self.phase == "image")

    def _adversarial(self, reconstruction: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Return the generator's hinge loss and its weight."""
        self.discriminator.requires_grad_(False)
        loss = -self.discriminator(fake).mean()
        weight = adaptive_weight(reconstruction, loss, self.state.autoencoder.last_layer)
        return loss, weight * self.state.options.discriminator_weight

    def _judge(self, real: Tensor, fake: Tensor) -> float:
        """Take the discriminator's step and return its loss; it learns before `discriminator_start`, too."""
        self.discriminator.requires_grad_(True)
        loss = hinge(self.discriminator(real), self.discriminator(fake))
        self.judge_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.judge_optimizer.step()
        return loss.item()

    def _parts(self) -> dict[str, Any]:
        return {
            "autoencoder": self.state.autoencoder,
            "optimizer": self.optimizer,
            "discriminator": self.discriminator,
            "judge_optimizer": self.judge_optimizer,
        }

    def save(self, step: int) -> None:
        """Write the checkpoint atomically."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"phase": self.phase, "step": step, "rows": self.state.rows, "metrics": self.state.metrics}
        with atomic_file(self.state.checkpoint) as temporary, temporary.open("wb") as stream:
            torch.save(state, stream)

    def resume(self) -> int:
        """Load the checkpoint if there is one; return the next step (the last one when a later phase has begun)."""
        if not self.state.checkpoint.is_file():
            return 0
        saved = torch.load(self.state.checkpoint, map_location=self.state.device, weights_only=True)
        if self.phase == "temporal" and saved["phase"] == "image":
            return 0
        self.state.rows[:] = saved["rows"]
        self.state.metrics |= saved["metrics"]
        if saved["phase"] != self.phase:
            return self.steps
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])
        return int(saved["step"])


def trainable(autoencoder: Autoencoder, phase: PhaseName, train_encoder: bool) -> Iterator[nn.Parameter]:
    """Yield the parameters of a phase, and freeze the others: (encoder and) spatial decoder, or the whole decoder."""
    autoencoder.requires_grad_(False)
    for name, parameter in autoencoder.named_parameters():
        decoder = name.startswith("decoder.")
        temporal = any(part in name for part in ("temporal_res_block", "time_mixer", "time_conv_out"))
        if (decoder and not (phase == "image" and temporal)) or (phase == "image" and train_encoder and not decoder):
            parameter.requires_grad_(True)
            yield parameter


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return autocast for the mixed precisions; weights stay float32 in every precision, they are small."""
    if precision == "32-true":
        return nullcontext()
    return torch.autocast(device.type, torch.float16 if precision == "16-mixed" else torch.bfloat16)
