"""The LightningModule of every diffusion stage: one objective, one optimiser, its own gradient clipping (§2, D.2)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from svd.config import Phase, TrainingConfig
from svd.diffusion import edm
from svd.diffusion.guidance import conditioned
from svd.latents.loader import Batch
from svd.model.autoencoder import Autoencoder
from svd.model.unet import UNet
from svd.tasks.base import Task
from svd.training.ema import Ema
from svd.training.finite import check_step
from svd.training.muon import Muon
from svd.training.parallel import parallelise

TEMPORAL_PARTS = ("temporal_", "time_pos_embed", "time_mixer")
# Of the transformers alone: residual blocks have a norm2 too.
DEAD_WITH_ONE_TOKEN = re.compile(r"transformer_blocks\.\d+\.(attn2\.to_[qk]|norm2)\.")


def select_parameters(unet: UNet, task: Task, part: Literal["all", "time-embedding", "temporal"]) -> None:
    """Let only a part of the network train.

    With a one-token context the softmax of the cross-attention is constant: its query, key and norm get no gradient.
    They are frozen, or weight decay would shrink them and DistributedDataParallel would wait for their gradients.
    """
    for name, parameter in unet.named_parameters():
        wanted = part == "all"
        wanted |= part == "time-embedding" and name.startswith("time_embedding.")
        wanted |= part == "temporal" and any(word in name for word in TEMPORAL_PARTS)
        dead = task.one_token and DEAD_WITH_ONE_TOKEN.search(name) is not None
        parameter.requires_grad_(wanted and not dead)


def learning_rate_factor(step: int, config: TrainingConfig, iterations: int) -> float:
    """Return the factor of the learning rate at a step: linear warm-up, then constant or half a cosine.

    A function of the preset alone: asking the trainer for the number of steps breaks Lightning's resuming.
    """
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.decay == "none":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * min(step, iterations) / iterations))


def make_optimizer(unet: UNet, settings: TrainingConfig, rate: float) -> torch.optim.Optimizer:
    """Make the optimiser of the trainable parameters; Muon takes the first and last layer for no hidden matrices."""
    trainable = [p for p in unet.parameters() if p.requires_grad]
    if settings.optimizer == "muon":
        ends = [*unet.conv_in.parameters(), *unet.conv_out.parameters()]
        return Muon(trainable, ends, settings.matrix_rate, rate, betas=settings.betas)
    # A fused optimiser skips the unscaling of fp16 gradients until after clipping.
    fused = trainable[0].is_cuda and settings.precision != "16-mixed"
    return torch.optim.AdamW(trainable, lr=rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=fused)


class Diffusion(pl.LightningModule):
    """Trains a U-Net on cached latents by plain squared error on v.

    The autoencoder, needed by tasks that encode the conditioning frame live, is frozen and kept out of the checkpoint.
    choose: sets which parameters of the U-Net train. compiled, context_ranks: as in `compute.training`.
    """

    def __init__(
        self,
        unet: UNet,
        task: Task,
        config: TrainingConfig,
        phase: Phase,
        autoencoder: Autoencoder | None,
        choose: Callable[[UNet], None],
        compiled: bool = False,
        context_ranks: int = 1,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.task = task
        self.settings = config
        self.phase = phase
        self.ema: Ema | None = None
        self.gradient_norm = torch.zeros(())
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._frozen = (autoencoder,)
        self._choose = choose
        self._compiled, self._context_ranks = compiled, context_ranks
        self._configured = False

    @property
    def autoencoder(self) -> Autoencoder | None:
        """The frozen autoencoder, on this module's device."""
        autoencoder = self._frozen[0]
        return autoencoder.to(self.device) if autoencoder is not None else None

    @property
    def kind(self) -> edm.Kind:
        """The preconditioning of the objective."""
        return edm.KINDS[self.settings.objective]

    def configure_model(self) -> None:
        """Choose what trains, compile, shard, and start the average of the weights; once."""
        if self._configured:
            return
        self._configured = True
        self._choose(self.unet)
        parallelise(self.unet, self._compiled, self.settings.precision, self.device_mesh, self._context_ranks)
        if self.settings.ema_decay is not None:
            self.ema = Ema(self.unet, self.settings.ema_decay, self.settings.ema_every)

    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of each clip, (B,)."""
        condition = self.task.condition(batch, self.unet, self.autoencoder)
        network = conditioned(self.unet, condition)
        return edm.loss(network, batch["latents"], batch["sigma"], batch["noise"], self.kind)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the mean loss, and the losses and noise levels of the clips for the callbacks."""
        losses = self.losses(batch)
        self._parts.append((losses.detach(), batch["index"]))
        return {"loss": losses.mean(), "losses": losses.detach(), "sigma": batch["sigma"]}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser (the paper's AdamW, or Muon) and the learning rate of each step."""
        settings = self.settings
        optimizer = make_optimizer(self.unet, settings, self.phase.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, settings, self.phase.iterations)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm here: Lightning refuses to do it for a fused AdamW in mixed precision.

        Raises NotFinite instead when a loss of this step, or the norm, isn't finite.
        """
        limit = self.settings.clip_norm if self.settings.clip_norm is not None else math.inf
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        self.gradient_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        losses, indices = (torch.cat(values) for values in zip(*self._parts, strict=True))
        self._parts.clear()
        check_step(losses, indices, self.gradient_norm if self.settings.precision != "16-mixed" else None)

    @contextmanager
    def evaluating(self) -> Iterator[UNet]:
        """Give the U-Net its averaged weights, in evaluation mode and without gradients, within the block."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), self.ema.swapped() if self.ema is not None else nullcontext():
                yield self.unet
        finally:
            self.train(was_training)
