"""Camera-motion LoRAs: one low-rank adapter of the temporal attention per camera motion (§4.3.1, D.4.2)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from svd.config import LoraConfig, Phase
from svd.core.errors import UserError
from svd.stage import Report, publish
from svd.training.parallel import first_rank
from svd.training.runner import Training, collect, measured, run_phases

# "object-motion" is a camera that stands still while things move.
CAMERAS: Mapping[str, tuple[str, ...]] = {
    "horizontal": ("pan-left", "pan-right"),
    "zoom": ("zoom-in", "zoom-out"),
    "static": ("static", "object-motion"),
}


def with_camera(training: Training, motion: str) -> Training:
    """Restrict the training to the clips with a camera motion; without test clips that have it, all of them serve.

    Raises UserError, when training begins, when no training clip has the motion.
    """

    def rows(phase: Phase, split: str) -> Sequence[Mapping[str, Any]]:
        every = training.rows(phase, split)
        chosen = [row for row in every if row["camera"] in CAMERAS[motion]]
        if not chosen and split == "train":
            raise UserError(
                f"{training.cache.folder}: no training clip has the camera motion '{motion}' "
                f"({', '.join(CAMERAS[motion])}); curate more, or leave it out of 'camera_lora.motions'"
            )
        return chosen or every

    return replace(training, name=f"{training.name}/{motion}", rows=rows, work=training.work / motion)


def train_loras(training: Training, config: LoraConfig) -> Report:
    """Train one adapter per motion; publish `<motion>/` with the peft files, `losses.csv` and `samples/`.

    The metrics are those of every training, with the motion as a suffix.
    """
    metrics: dict[str, float | int | str] = {}
    results = {}
    for motion in config.motions:
        single = replace(with_camera(training, motion), lora=(motion, config.rank, config.alpha))
        results[motion] = run_phases(single)
        metrics |= {f"{key}_{motion}": value for key, value in measured(single, results[motion][1]).items()}
    report = Report(metrics, f"{len(results)} LoRAs of rank {config.rank}: {', '.join(results)}")
    if not first_rank():
        return report
    finished = training.work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    for motion, (last, history) in results.items():
        collect(last, history, finished / motion)
    return publish(finished, training.context.output, report)
