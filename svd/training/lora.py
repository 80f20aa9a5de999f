"""Camera-motion LoRAs: one low-rank adapter of the temporal attention per camera motion (§4.3.1, D.4.2)."""

from __future__ import annotations

import shutil
from dataclasses import replace

import polars as pl

from svd.config import LoraConfig, Phase
from svd.core.errors import UserError
from svd.latents.index import Rows
from svd.stage import Report
from svd.tasks.camera_motions import CAMERAS
from svd.training.parallel import first_rank
from svd.training.runner import Training, collect, compare, measured, publish_model, run_phases


def with_camera(training: Training, motion: str) -> Training:
    """Restrict the training to the clips with a camera motion; without test clips that have it, all of them serve.

    Raises UserError, when training begins, when no training clip has the motion.
    """

    def rows(phase: Phase, split: str) -> Rows:
        every = training.rows(phase, split)
        chosen = every.where(pl.col("camera").is_in(CAMERAS[motion]))
        if not chosen and split == "train":
            raise UserError(
                f"{training.cache.folder}: no training clip has the camera motion '{motion}' "
                f"({', '.join(CAMERAS[motion])}); curate more, or leave it out of 'camera_lora.motions'"
            )
        return chosen or every

    return replace(training, name=f"{training.name}/{motion}", rows=rows, work=training.work / motion)


def train_loras(training: Training, config: LoraConfig) -> Report:
    """Train one adapter per motion; publish `<motion>/`: peft files, `losses.csv`, `validation.csv`, `samples/`.

    The metrics are those of every training, with the motion as a suffix.
    """
    metrics: dict[str, float | int | str] = {}
    finished = training.work / "finished"
    if first_rank():
        shutil.rmtree(finished, ignore_errors=True)
    for motion in config.motions:
        single = replace(with_camera(training, motion), lora=(motion, config.rank, config.alpha))
        last, history = run_phases(single)
        own = measured(single, history)
        if first_rank():
            collect(last, history, finished / motion)
            own |= compare(single, history, finished / motion)
        metrics |= {f"{key}_{motion}": value for key, value in own.items()}
    report = Report(metrics, f"{len(config.motions)} LoRAs of rank {config.rank}: {', '.join(config.motions)}")
    return publish_model(training, finished, report) if first_rank() else report
