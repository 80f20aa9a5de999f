"""What a stage's validation loss is compared with, on the same samples, noise and levels.

`validation.csv` of a stage has a row per validation sample: `sigma`, and its loss under

- `before` (the first weights) and `after` (the averaged last ones);
- `linear`: the best linear filter (svd/training/linear_filter.py);
- `swapped`: the last weights, given the frames of another clip or, for a task without, its caption. Not below it, the
  network doesn't read them; longer training alone can't show that;
- `start`, when the stage started from a trained network: that network conditioned as it was trained. Where the task
  changes it differs from `before`: an image-to-video network starts from one that reads the caption. Elsewhere the two
  are alike, unless the stage lost its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from svd.core.device import pick_device
from svd.core.errors import UserError
from svd.core.margins import margin
from svd.diffusion import edm
from svd.diffusion.edm import Kind
from svd.diffusion.guidance import conditioned
from svd.latents.batches import Steps, in_order
from svd.latents.loader import Batch, Examples
from svd.model.autoencoder import Autoencoder
from svd.model.unet import UNet
from svd.tasks.base import Task
from svd.tasks.registry import TASKS
from svd.tasks.signals import ClipSignals, with_signals_of
from svd.tasks.text_to_video import IMAGE
from svd.training.linear_filter import LinearFilter, Pair, fit

CONTROLS = ("linear", "swapped", "start")  # columns that the last weights should be below
FITTED = 2048  # training samples at most; their covariances cost memory, and more of them change little


@dataclass(frozen=True)
class Validation:
    """The validation of a stage: `count` samples of `test`, and the samples of `train` that a baseline may learn from.

    train: without dropout and unrelated images. batch: samples computed at once.
    """

    task: Task
    autoencoder: Autoencoder
    kind: Kind
    train: Examples
    test: Examples
    count: int
    batch: int

    @property
    def sigmas(self) -> Tensor:
        """The noise level of each sample, (count,)."""
        return torch.stack([self.test.draws.sigma(index) for index in range(self.count)])

    @property
    def clips(self) -> list[str]:
        """The clip of each sample; few test clips are drawn several times, and windows of one are not independent."""
        return [str(self.test.row(index)["clip_id"]) for index in range(self.count)]

    def linear(self) -> Tensor:
        """Return the losses of the linear filter that is fitted to the training samples, (count,).

        Raises UserError for NaN in a training sample, which the training itself need not have drawn.
        """
        fitted = fit(self._finite_pair(batch) for batch in self._batches(self.train, min(len(self.train), FITTED)))
        return torch.cat([self._filtered(fitted, batch) for batch in self._batches(self.test, self.count)])

    def _filtered(self, fitted: LinearFilter, batch: Batch) -> Tensor:
        latents, given = self._pair(batch)
        return fitted.losses(latents, batch["sigma"], batch["noise"], given, self.kind)

    def _finite_pair(self, batch: Batch) -> Pair:
        fine = torch.isfinite(batch["latents"]).flatten(1).all(1)
        if bad := batch["index"][~fine].tolist():
            (row, *_), folder = self.train.sources(bad[0]), self.train.cache.folder
            raise UserError(
                f"{folder}: the latents of clip {row['clip_id']} hold NaN (row {row['row']} of shards/{row['shard']}); "
                "delete the shard and run the stage 'latents' again"
            )
        return self._pair(batch)

    def _pair(self, batch: Batch) -> Pair:
        """Return latents and conditioning latents on one scale, (B, T, C, h, w) and (B, N, C, h, w) or None."""
        given = self._observe(self.task, batch).latents
        scale = edm.expand(batch["scaling_factor"], batch["latents"])
        return batch["latents"], None if given is None else given.cpu() * scale

    def losses_of_start(self, unet: UNet) -> Tensor | None:
        """Return the losses, (count,), of the network that the training started from, conditioned as it was trained.

        Between two tasks with a conditioning frame that is this task's conditioning, as far as the network has inputs
        for it; clips without captions have the empty prompt. None for a network that belongs to no task.
        """
        task = trained_task(unet)
        if task is None:
            return None
        return self.losses(unet, self.task if task.pixels and self.task.pixels else task)

    @property
    def others(self) -> list[int]:
        """For each sample the next one of another clip; itself where there is one clip alone."""
        clips, count = self.clips, self.count
        after = ([(index + step) % count for step in range(1, count)] for index in range(count))
        return [next((o for o in turn if clips[o] != clips[index]), index) for index, turn in enumerate(after)]

    def losses_swapped(self, unet: UNet) -> Tensor:
        """Return the losses, (count,), of a trained network that is given the frames or the caption of another clip."""
        others = self.others

        def swap(signals: ClipSignals, batch: Batch) -> ClipSignals:
            given = default_collate([self.test[others[index]] for index in batch["index"].tolist()])
            return with_signals_of(signals, self._observe(self.task, given))

        return self.losses(unet, self.task, swap)

    @torch.no_grad()
    def losses(
        self, unet: UNet, task: Task, change: Callable[[ClipSignals, Batch], ClipSignals] = lambda signals, _: signals
    ) -> Tensor:
        """Return the losses of a network that was trained for `task`, conditioned as `task` does, (count,).

        change: what becomes of the signals of a batch before the network gets them.
        """
        device = torch.device(pick_device())
        unet, found = unet.to(device).eval(), []
        for batch in self._batches(self.test, self.count):
            network = conditioned(unet, task.build(change(self._observe(task, batch), batch), unet))
            latents, sigma, noise = (batch[name].to(device) for name in ("latents", "sigma", "noise"))
            found.append(edm.loss(network, latents, sigma, noise, self.kind).float().cpu())
        return torch.cat(found)

    def _observe(self, task: Task, batch: Batch) -> ClipSignals:
        device = torch.device(pick_device())
        return task.observe({name: value.to(device) for name, value in batch.items()}, self.autoencoder.to(device))

    def _batches(self, examples: Examples, count: int) -> Iterator[Batch]:
        """Yield samples 0 … count - 1 in batches."""
        size = min(self.batch, count)
        for batch in DataLoader(examples, batch_sampler=Steps(in_order(size), range(-(-count // size)))):
            yield {name: value[: count - int(batch["index"][0])] for name, value in batch.items()}


def trained_task(unet: UNet) -> Task | None:
    """Return the task that a network of this shape was trained for; None when no task has it."""
    channels, config = unet.config.out_channels, unet.config
    wanted = (config.temporal, config.in_channels, config.ids)
    return next((t for t in (IMAGE, *TASKS) if (t.temporal, t.in_channels(channels), t.ids) == wanted), None)


def compared(columns: Mapping[str, Tensor], sigmas: Tensor, clips: Sequence[str]) -> dict[str, float | int | str]:
    """Return the metrics of a stage's `columns` of losses, (N,) each, of the samples' noise levels and clips.

    `validation_loss_<column>`, and for those of CONTROLS how far the last weights are below them, in standard errors of
    the paired difference at equal noise levels over independent clips (`validation_margin_<column>`; missing where it
    isn't known).
    """
    metrics: dict[str, float | int | str] = {
        "validation_samples": len(sigmas),
        "validation_clips": len(set(clips)),
    }
    for name, losses in columns.items():
        metrics[f"validation_loss_{name}"] = round(losses.mean().item(), 6)
        if name in CONTROLS:
            found = margin((losses - columns["after"]).tolist(), sigmas.tolist(), clips)
            metrics |= {} if found is None else {f"validation_margin_{name}": round(found, 3)}
    return metrics


def write_table(path: Path, columns: Mapping[str, Tensor], sigmas: Tensor) -> None:
    """Write `validation.csv`; equal runs give equal text."""
    lines = [",".join(["sigma", *columns])]
    lines += [",".join(f"{value:.6g}" for value in row) for row in zip(sigmas, *columns.values(), strict=True)]
    path.write_text("\n".join(lines) + "\n")
