"""Run a training stage: its phases in sequence, each a Lightning fit that resumes exactly, then publish (§3).

Every phase starts from the averaged weights of the one before, with a fresh optimiser, as every stage does.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from svd.config import Phase, TrainingCompute, TrainingConfig
from svd.core.errors import UserError
from svd.core.files import write_json
from svd.core.finite import require_finite
from svd.diffusion.edm import KINDS
from svd.latents.batches import Buckets, IndexedLoader, bucket_seed
from svd.latents.cache import LatentCache, digest
from svd.latents.index import Rows
from svd.latents.loader import Draws, Examples
from svd.model.autoencoder import Autoencoder
from svd.model.formats.folders import load_unet, save_unet
from svd.model.lora import add_lora, save_lora
from svd.model.unet import UNet
from svd.stage import Report, StageContext, publish
from svd.tasks.base import Task
from svd.training import callbacks, checkpoint_files, comparisons, speed
from svd.training.callbacks import History
from svd.training.card_contents import training_card
from svd.training.checkpoint_files import newest_checkpoint
from svd.training.finite import NotFinite, explain
from svd.training.initialise import with_checkpointing
from svd.training.model_card import write_card
from svd.training.module import Diffusion, select_parameters
from svd.training.parallel import first_rank, full_state, strategy
from svd.training.profiling import Profiling
from svd.training.ranks import rank
from svd.training.samples import Preview, preview_sheet, write_films
from svd.training.sharded_checkpoints import readable_checkpoint
from svd.training.shares import unshareable

logger = logging.getLogger(__name__)
STRATA = 8
VALIDATION_SEED = 20231125


@dataclass(frozen=True)
class Training:
    """The training of a stage: the task, its samples and its first weights.

    rows: the training and the test samples of a phase. initial: the U-Net of step 0. lora: train an adapter of this
    name, rank and alpha instead of the U-Net. work: where the phases keep their state. source: the trained network
    that the weights of step 0 come from, a folder or file; None when they are fresh.
    """

    name: str
    context: StageContext
    task: Task
    config: TrainingConfig
    compute: TrainingCompute
    cache: LatentCache
    autoencoder: Autoencoder
    rows: Callable[[Phase, str], Rows]
    initial: Callable[[], UNet]
    work: Path
    lora: tuple[str, int, float] | None = None
    source: Path | None = None

    @property
    def seed(self) -> int:
        """The seed of the stage: stages draw different noise from one preset seed."""
        return int(digest(self.context.preset.seed, self.name)[:12], 16)

    def draws(self, phase: Phase, seed: int, strata: int = 0) -> Draws:
        """Return the random draws of a phase; with `strata`, those of its fixed validation."""
        config = self.config
        return Draws(
            seed,
            phase.p_mean,
            phase.p_std,
            objective=config.objective,
            offset_noise=0.0 if strata else config.offset_noise,
            text_dropout=config.text_dropout,
            image_dropout=config.image_dropout,
            conditioning_p_mean=config.conditioning_p_mean,
            conditioning_p_std=config.conditioning_p_std,
            caption_probabilities=tuple(sorted(self.context.preset.curation.captions.probabilities.items())),
            pixels=self.task.pixels,
            image_share=phase.image_share,
            strata=strata,
        )

    def buckets(self, number: int) -> Buckets:
        """Return the training samples of phase `number`; each bucket has draws of its own."""
        phases, seed = self.config.phases[number].by_bucket, int(digest(self.seed, number)[:12], 16)
        examples = [
            Examples(
                self.cache,
                self.rows(phase, "train"),
                phase.frames,
                self.draws(phase, bucket_seed(seed, bucket)),
                self.compute.damaged_share,
            )
            for bucket, phase in enumerate(phases)
        ]
        return Buckets(examples, [phase.batch_size for phase in phases], seed)

    def validation(self) -> Examples:
        """Return test clips of the last phase with fixed noise at stratified levels: one measure per stage."""
        phase = self.config.phases[-1]
        draws = self.draws(phase, VALIDATION_SEED, STRATA)
        return Examples(self.cache, self.rows(phase, "test"), phase.frames, draws, self.compute.damaged_share)

    @property
    def validated(self) -> int:
        """How many samples are validated: whole batches of the preset, so that the same draws are measured however a
        batch is split to fit into memory."""
        batch = self.config.phases[-1].batch_size
        return -(-self.config.validation_samples // batch) * batch

    def comparison(self) -> comparisons.Validation:
        """Return the validation as a baseline sees it: with the training samples of the last phase."""
        phase = self.config.phases[-1]
        draws = replace(self.draws(phase, self.seed), image_dropout=0.0, image_share=0.0)
        train = Examples(self.cache, self.rows(phase, "train"), phase.frames, draws, self.compute.damaged_share)
        part = max(1, phase.batch_size // self.compute.gradient_accumulation)
        kind = KINDS[self.config.objective]
        return comparisons.Validation(self.task, self.autoencoder, kind, train, self.validation(), self.validated, part)

    def choose(self, phase: Phase) -> Callable[[UNet], None]:
        """Return what sets the trainable parameters: a part of the U-Net, or an adapter added to it."""
        if self.lora is None:
            return lambda unet: select_parameters(unet, self.task, phase.trainable)
        name, rank, alpha = self.lora

        def adapt(unet: UNet) -> None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                add_lora(unet, rank, alpha, name, context_tokens=1 if self.task.one_token else 77)

        return adapt

    def preview(self) -> Preview:
        """Return the preview: clips sampled as the preset generates this task, in `sample_steps` steps."""
        sampling = self.task.preset_sampling(self.context.preset).model_copy(
            update={"steps": self.compute.sample_steps}
        )
        return Preview(self.task, self.validation(), self.autoencoder, sampling, KINDS[self.config.objective])


def quiet() -> None:
    """Keep Lightning's hints about loggers, workers and cards out of the user's terminal."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*is_weights_only.*",
        ".*resuming.*",
        ".*returned a view tensor.*",
        ".*treespec.*",
        ".*functional.all_gather is deprecated.*",
    ):
        warnings.filterwarnings("ignore", text)


def make_trainer(training: Training, phase: Phase, folder: Path, hooks: list[pl.Callback]) -> pl.Trainer:
    """Make the Lightning trainer of a phase: it does loops, precision and distribution, the loader order and draws."""
    compute = training.compute
    return pl.Trainer(
        accelerator="auto",
        devices=compute.devices,
        num_nodes=compute.nodes,
        strategy=strategy(compute),
        precision=training.config.precision,
        max_steps=phase.iterations,
        max_epochs=-1,
        accumulate_grad_batches=compute.gradient_accumulation,
        callbacks=hooks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def run_phase(training: Training, number: int) -> Path:
    """Train phase `number`, or resume it where it was killed; return its folder with `unet/` and `history.json`."""
    config, compute, phase = training.config, training.compute, training.config.phases[number]
    folder = training.work / f"phase-{number}"
    if (folder / "history.json").exists():
        checkpoint_files.prune(folder, keep=0)  # a kill may have come just before
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    previous = training.work / f"phase-{number - 1}"
    unet = load_unet(previous / "unet") if number else training.initial()
    history = History(json.loads((previous / "history.json").read_text()) if number else [])
    offset = sum(p.iterations for p in config.phases[:number])
    unet = with_checkpointing(unet, compute.checkpointing)
    choose, shared = training.choose(phase), compute.context_ranks
    module = Diffusion(unet, training.task, config, phase, training.autoencoder, choose, compute.compile, shared)
    stopwatch = speed.Stopwatch()
    trainer = make_trainer(training, phase, folder, _hooks(training, number, folder, history, stopwatch))
    for planned in config.phases:  # all of them, before the first one trains
        if problem := unshareable(planned, compute, trainer.world_size):
            raise UserError(f"{training.name}: {problem}")
    buckets = training.buckets(number)
    loader = IndexedLoader(
        buckets,
        phase.iterations,
        compute.gradient_accumulation,
        trainer.global_rank // shared,
        trainer.world_size // shared,
        compute.num_workers,
    )
    checkpoint = readable_checkpoint(newest_checkpoint(folder), compute.strategy)
    try:
        watched = speed.WatchedLoader(loader, stopwatch)
        trainer.fit(module, watched, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:
        step = offset + trainer.global_step
        logger.warning("%s: stopped at step %d by SIGTERM; the same command goes on there", training.name, step)
        sys.exit(128 + signal.SIGTERM)
    except NotFinite as error:
        raise explain(error, buckets, offset + trainer.global_step + 1, folder) from None
    _finish_phase(trainer, module, training, folder, history)
    return folder


def _hooks(
    training: Training, number: int, folder: Path, history: History, stopwatch: speed.Stopwatch
) -> list[pl.Callback]:
    config, compute, tracker = training.config, training.compute, training.context.tracker
    phase, offset = config.phases[number], sum(p.iterations for p in config.phases[:number])
    validation, preview = training.validation(), training.preview()
    part = max(1, config.phases[-1].batch_size // compute.gradient_accumulation)

    def validate(module: Diffusion, trainer: pl.Trainer) -> tuple[Tensor, Tensor]:
        losses, sigmas = callbacks.validate(module, trainer, validation, training.validated, part)
        if bad := (~torch.isfinite(losses)).nonzero().flatten().tolist():
            raise explain(NotFinite(bad), validation, offset + trainer.global_step, folder)
        return losses, sigmas

    def show(module: Diffusion, step: int, first_rank: bool) -> None:
        sheet = preview_sheet(preview.films(module.unet))
        if first_rank:
            tracker.log_image(f"samples/{training.name}", sheet, step)

    phases = len(config.phases)
    record = callbacks.Record(
        history,
        tracker,
        validate,
        speed.make_meter(stopwatch, training.context.preset, training.task, config, phase, compute),
        validate_every=compute.validate_every,
        offset=offset,
        total=sum(p.iterations for p in config.phases[: number + 1]),
        label=training.name if phases == 1 else f"{training.name} {number + 1}/{phases}",
    )
    return [
        callbacks.Averaging(),
        record,
        callbacks.Samples(show, compute.validate_every, offset),
        *_profiling(training, folder, offset),
        callbacks.PhaseCheckpoint(folder, compute.checkpoint_every, compute.keep_checkpoints),
    ]


def _profiling(training: Training, folder: Path, offset: int) -> list[pl.Callback]:
    """Return what traces some steps, if that is asked for; the first rank alone does."""
    wanted, name = training.context.profile, "-".join(folder.relative_to(training.context.work).parts)
    return [Profiling(wanted.folder, name, wanted.steps, offset)] if wanted and rank() == 0 else []


def _finish_phase(trainer: pl.Trainer, module: Diffusion, training: Training, folder: Path, history: History) -> None:
    """Write the averaged weights and samples; `history.json` comes last and marks the phase as done."""
    with module.evaluating(), trainer.precision_plugin.forward_context():
        state = full_state(module.unet)
        require_finite(state, f"{training.name}: the averaged weights")
        films = training.preview().films(module.unet)
    if trainer.is_global_zero:
        with torch.device("meta"):
            plain = UNet(replace(module.unet.config, checkpointing="none"))
            training.choose(module.phase)(plain)
        plain.load_state_dict(state, assign=True)
        if training.lora is None:
            save_unet(plain, folder / "unet", module.phase.frames)
        else:
            save_lora(plain, folder / "lora", training.lora[0])
        write_films(films, folder / "samples")
        step = int(history.rows[-1]["step"] or 0)
        training.context.tracker.log_image(f"samples/{training.name}", preview_sheet(films), step)
        write_json(folder / "history.json", history.rows)
        checkpoint_files.prune(folder, keep=0)
    trainer.strategy.barrier()


def run_phases(training: Training) -> tuple[Path, History]:
    """Run all phases; return the last one's folder, with `unet/` or `lora/` and `samples/`, and the loss curve."""
    quiet()
    for number in range(len(training.config.phases)):
        last = run_phase(training, number)
    return last, History(json.loads((last / "history.json").read_text()))


def collect(last: Path, history: History, finished: Path) -> None:
    """Copy the results of the last phase, and the loss curve, into a folder to publish."""
    finished.mkdir(parents=True, exist_ok=True)
    for part in ("unet", "lora", "samples"):
        if (last / part).exists():
            shutil.copytree(last / part, finished / part if part != "lora" else finished, dirs_exist_ok=True)
    (finished / "losses.csv").write_text(history.csv())


def run_training(training: Training) -> Report:
    """Run all phases and publish their folder: `unet/` (averaged weights), `losses.csv`, `validation.csv`, `samples/`.

    Metrics: those of `measured` and `svd.training.comparisons.compared`, on test clips with the noise distribution of
    the last phase.
    """
    last, history = run_phases(training)
    metrics = measured(training, history)
    if not first_rank():
        return Report(metrics, training.name)
    finished = training.work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    collect(last, history, finished)
    metrics |= compare(training, history, finished)
    summary = "{steps} steps; loss on test clips {validation_loss_before} -> {validation_loss_after}"
    summary += ", of a linear filter {validation_loss_linear}"
    return publish_model(training, finished, Report(metrics, summary.format(**metrics)))


def publish_model(training: Training, finished: Path, report: Report) -> Report:
    """Publish a finished training with its model card."""
    context = training.context
    card = training_card(training.name, training.task, training.config, training.cache, context, training.source)
    write_card(finished, card, context, report)
    return publish(finished, context.output, report)


def compare(training: Training, history: History, finished: Path) -> dict[str, float | int | str]:
    """Compute the losses that those of the training are compared with, write `validation.csv`, return the metrics."""
    validation = training.comparison()
    columns = {name: torch.tensor(history.rows[k]["val_losses"]) for name, k in (("before", 0), ("after", -1))}
    columns["linear"] = validation.linear()
    if training.lora is None:
        columns["swapped"] = validation.losses_swapped(load_unet(finished / "unet"))
    if training.source is not None:
        own = validation.losses_of_start(load_unet(training.source))
        columns["start"] = columns["before"] if own is None else own
    comparisons.write_table(finished / "validation.csv", columns, validation.sigmas)
    levels = callbacks.sigma_bins(columns["linear"], validation.sigmas, "val_loss_linear")
    known = {"val_loss_linear": columns["linear"].mean().item(), **levels}
    for step in (0, int(history.rows[-1]["step"])):  # two points: a level line beside the curve of val_loss
        training.context.tracker.log_metrics(known, step)
    return comparisons.compared(columns, validation.sigmas, validation.clips)


def measured(training: Training, history: History) -> dict[str, float | int | str]:
    """Return the metrics of a training alone.

    validation_loss_before (first weights) and validation_loss_after (averaged last ones); steps; samples_train,
    samples_test. A clip that is cached in several sizes counts in each bucket.
    """
    phase = training.config.phases[-1]
    before, after = (history.rows[k]["val_loss"] for k in (0, -1))
    return {
        "validation_loss_before": round(before or 0.0, 6),
        "validation_loss_after": round(after or 0.0, 6),
        "steps": sum(phase.iterations for phase in training.config.phases),
        "samples_train": sum(len(training.rows(bucket, "train")) for bucket in phase.by_bucket),
        "samples_test": len(training.rows(phase, "test")),
    }
