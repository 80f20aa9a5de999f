"""Callbacks around a training step: averaging, validation, record, samples, progress and checkpoints.

Order matters and is that of the runner's `_hooks`: the average takes in the step, the validation measures the
average, the record keeps both, and only then the checkpoint is written, so that a run resumed from it repeats nothing
and omits nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from svd.core.files import replace_file, replace_folder
from svd.latents.batches import Steps, in_order
from svd.latents.loader import Examples
from svd.stage import Tracker
from svd.training import checkpoint_files
from svd.training.module import Diffusion
from svd.training.speed import Meter

SIGMA_EDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
Row = dict[str, Any]


class Updates(Callback):
    """Base of callbacks that act once per optimiser step: with gradient accumulation most batches take none."""

    last_step = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start counting at the step that training resumes from."""
        self.last_step = trainer.global_step

    def stepped(self, trainer: pl.Trainer) -> bool:
        """Return whether the batch that just ended took a step; True once per step."""
        new = trainer.global_step != self.last_step
        self.last_step = trainer.global_step
        return new


class Averaging(Updates):
    """Updates the exponential moving average of the weights."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take in the new weights."""
        if self.stepped(trainer) and module.ema is not None:
            module.ema.update(trainer.global_step)


def sigma_bins(losses: Tensor, sigma: Tensor, prefix: str) -> dict[str, float]:
    """Return the mean loss per noise level, keyed `<prefix>/sigma_<low>-<high>`; empty bins are left out."""
    which = torch.bucketize(sigma, torch.tensor(SIGMA_EDGES, device=sigma.device))
    names = ["0", *(f"{edge:g}" for edge in SIGMA_EDGES), "inf"]
    return {
        f"{prefix}/sigma_{names[k]}-{names[k + 1]}": losses[which == k].mean().item()
        for k in range(len(names) - 1)
        if bool((which == k).any())
    }


def validate(
    module: Diffusion, trainer: pl.Trainer, examples: Examples, count: int, batch: int
) -> tuple[Tensor, Tensor]:
    """Measure the averaged weights on the fixed validation draws; return losses and noise levels, (count,) each.

    Both are in the order of the samples' indices. The ranks share the work, those of one split the same clips; the last
    incomplete batch is filled up with further draws so that each does equally much.
    """
    shared = module.unet.split.ranks
    groups = trainer.world_size // shared
    batch = max(batch // groups, 1) * groups
    steps = Steps(in_order(batch), range(-(-count // batch)), trainer.global_rank // shared, groups)
    losses, sigmas, indices = [], [], []
    with module.evaluating(), trainer.precision_plugin.forward_context():
        shown = {"desc": "validation", "unit": "batch", "leave": False, "delay": 2}
        for batch_of_rank in tqdm(
            DataLoader(examples, batch_sampler=steps), disable=not trainer.is_global_zero, **shown
        ):
            moved = {key: value.to(module.device) for key, value in batch_of_rank.items()}
            losses.append(module.losses(moved).float())
            sigmas.append(moved["sigma"])
            indices.append(moved["index"].float())
    parts = torch.stack([torch.cat(losses), torch.cat(sigmas), torch.cat(indices)])
    of_groups = trainer.strategy.all_gather(parts).view(-1, *parts.shape)[::shared]
    loss, sigma, index = of_groups.movedim(1, 0).flatten(1)
    order = index.argsort()
    return loss[order], sigma[order]


@dataclass
class History:
    """The loss curve, one row every few steps: step, train_loss, val_loss (None where nothing was validated).

    The first and the last validation of a phase also keep the loss of each sample: val_losses.
    """

    rows: list[Row] = field(default_factory=list)

    def csv(self) -> str:
        """Return the curve as CSV; equal runs give equal text."""
        lines = ["step,train_loss,val_loss"]
        for row in self.rows:
            values = ("" if row[k] is None else f"{row[k]:.6f}" for k in ("train_loss", "val_loss"))
            lines.append(",".join([str(row["step"]), *values]))
        return "\n".join(lines) + "\n"


class Record(Updates):
    """Keeps the loss curve inside the checkpoint, reports to the tracker and shows progress.

    offset: steps of the phases before. The validation loss is recorded every `validate_every` steps and at the end,
    and, in the first phase, before the first step; the training loss is the mean over the steps since the last row.
    """

    def __init__(
        self,
        history: History,
        tracker: Tracker,
        validation: Callable[[Diffusion, pl.Trainer], tuple[Tensor, Tensor]],
        meter: Meter,
        *,
        validate_every: int,
        offset: int,
        total: int,
        label: str,
    ) -> None:
        self.history, self.tracker, self.validation, self.meter = history, tracker, validation, meter
        self.validate_every, self.offset, self.total, self.label = validate_every, offset, total, label
        self.log_every = max(1, min(50, total // 50))
        self.pending: list[float] = []
        self.unreduced: list[Tensor] = []
        self.parts: list[Tensor] = []
        self.levels: list[Tensor] = []
        self.bar: tqdm[Any] | None = None
        self.strategy: Strategy

    def state_dict(self) -> dict[str, Any]:
        """Return the curve so far; every rank must call it."""
        self._reduce()
        return {"rows": self.history.rows, "pending": self.pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the curve of the checkpoint."""
        self.history.rows, self.pending = state["rows"], state["pending"]

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Validate the initial weights of the stage, once."""
        super().on_train_start(trainer, module)
        self.strategy = trainer.strategy
        self.meter.start(module.device, trainer.world_size)
        if trainer.is_global_zero:
            self.bar = tqdm(total=self.total, initial=self.offset + trainer.global_step, desc=self.label, unit="step")
        if not self.history.rows:
            self._add(0, None, self._validate(trainer, module, 0), whole=True)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the step."""
        losses, shape = outputs["losses"], batch["latents"].shape
        self.levels.append(torch.stack([losses, outputs["sigma"]]).float())
        self.parts.append(losses.mean())
        if not self.stepped(trainer):
            self.meter.stop(shape)
            return
        # A step counts once, and none that is under way, into however many parts accumulation splits it.
        self.unreduced.append(torch.stack(self.parts).mean())
        self.parts.clear()
        step, last = self.offset + trainer.global_step, trainer.global_step == trainer.max_steps
        validated = last or trainer.global_step % self.validate_every == 0
        due = validated or step % self.log_every == 0
        if due:
            self._reduce()  # before the meter stops: it waits for the device, whose work belongs to the step
        self.meter.stop(shape, module.gradient_norm)
        if due:
            loss = self._log(trainer, module, step)
            self._add(step, loss, self._validate(trainer, module, step) if validated else None, whole=last)
        if self.bar is not None:
            self.bar.update()

    def _reduce(self) -> None:
        """Average the losses since the last call over the ranks; in every step it would make the host wait."""
        if self.unreduced:
            self.pending += self.strategy.reduce(torch.stack(self.unreduced).float(), reduce_op="mean").tolist()
            self.unreduced.clear()

    def _add(self, step: int, train: float | None, losses: Tensor | None, whole: bool) -> None:
        row: Row = {"step": step, "train_loss": train, "val_loss": None if losses is None else losses.mean().item()}
        if losses is not None and whole:
            row["val_losses"] = losses.tolist()
        self.history.rows.append(row)
        if self.bar is not None and train is not None:
            self.bar.set_postfix(loss=f"{train:.3f}", refresh=False)

    def _log(self, trainer: pl.Trainer, module: Diffusion, step: int) -> float:
        """Log what was gathered since the last row; return the training loss."""
        loss = sum(self.pending) / len(self.pending)
        self.pending.clear()
        losses, sigma = torch.cat(self.levels, dim=1)
        self.levels.clear()
        facts = self.meter.take(module.device)
        if trainer.is_global_zero:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            values = {"train_loss": loss, **sigma_bins(losses, sigma, "train_loss"), "learning_rate": rate}
            self.tracker.log_metrics({**values, **facts.metrics()}, step)
        return loss

    def _validate(self, trainer: pl.Trainer, module: Diffusion, step: int) -> Tensor:
        losses, sigma = self.validation(module, trainer)
        if trainer.is_global_zero:
            self.tracker.log_metrics({"val_loss": losses.mean().item(), **sigma_bins(losses, sigma, "val_loss")}, step)
        return losses

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


class Samples(Updates):
    """Shows every few steps what the averaged weights generate.

    show: gets the module, the step over all phases, and whether this rank is the first.
    """

    def __init__(self, show: Callable[[Diffusion, int, bool], None], every: int, offset: int) -> None:
        self.show, self.every, self.offset = show, every, offset

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Sample where the loss is validated, but not at the end, which the stage itself samples."""
        due = (
            self.stepped(trainer) and trainer.global_step % self.every == 0 and trainer.global_step != trainer.max_steps
        )
        if due:
            with module.evaluating(), trainer.precision_plugin.forward_context():
                self.show(module, self.offset + trainer.global_step, trainer.is_global_zero)


class PhaseCheckpoint(ModelCheckpoint):
    """Keeps the newest states of a phase, `step=<n>.ckpt`, each written atomically; also written on SIGTERM.

    SIGTERM waits for the end of a step. Other exceptions may fall into the middle of one, and half a step is no state
    to continue from.
    """

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self.keep = keep
        super().__init__(
            folder,
            "{step}",
            save_top_k=1,
            every_n_train_steps=every,
            save_on_exception=True,
            enable_version_counter=False,
        )

    @property
    def state_key(self) -> str:
        """Return the key of the state in a checkpoint; Lightning's own names the interval, which may change."""
        return "Checkpoint"

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue at the first batch of the next step.

        The saved number of batches is of the accumulation that the run had then, and of a step that SIGTERM cut in two
        it counts the half whose gradients are lost.
        """
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        loop = checkpoint["loops"]["fit_loop"]
        loop["state_dict"]["combined_loader"] = [{"next": batches}]
        for count in ("current", "total"):
            progress = loop["epoch_loop.batch_progress"][count]
            progress |= dict.fromkeys(progress, batches)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Save under another name and rename: a sharded checkpoint is a folder of files that are written one by one."""
        partial = Path(f"{filepath}.part")
        if trainer.is_global_zero and partial.is_dir():
            shutil.rmtree(partial)
        trainer.strategy.barrier()
        super()._save_checkpoint(trainer, str(partial))
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            (replace_folder if partial.is_dir() else replace_file)(partial, Path(filepath))
            checkpoint_files.prune(Path(filepath).parent, self.keep)
        trainer.strategy.barrier()

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Leave to `prune` what Lightning would remove: it knows none but the last one of this process."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save when the machine is being taken away."""
        if isinstance(exception, SIGTERMException):
            super().on_exception(trainer, pl_module, exception)
