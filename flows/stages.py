"""The stages of the system in one table: what runs them, what they read, where they run.

`dvc.yaml` lists the same stages for `dvc repro`; a test keeps the two in step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from svd.core.errors import UserError
from svd.stage import Report, StageContext

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = Path("outputs")


@dataclass(frozen=True)
class Stage:
    """A stage: the function that runs it, its inputs (names of stages) and the work pool it belongs to.

    model: the name under which what it trains is registered. base: the stage whose U-Net the trained adapters are for.
    """

    name: str
    module: str
    inputs: tuple[str, ...] = ()
    function: str = "run"
    pool: Literal["cpu", "gpu"] = "gpu"
    model: str | None = None
    base: str | None = None

    @property
    def distributed(self) -> bool:
        """Whether it trains on all ranks of a launcher; other stages run in the first process alone."""
        return self.module in (_TRAINING, _CALIBRATION)

    def load(self) -> Callable[[StageContext], Report]:
        """The function `run(context) -> Report`; imported late, because some stages import torch."""
        return cast(Callable[[StageContext], Report], getattr(importlib.import_module(self.module), self.function))


_NETWORKS = ("autoencoder", "encoders")
_TRAINING = "svd.training.stages"
_CALIBRATION = "evaluation.calibration.stage"
_LIST = (
    Stage("sources", "svd.sources.stage", pool="cpu"),
    Stage("encoders", "svd.training.encoders"),
    Stage("curation", "svd.curation.stage", ("sources", "encoders"), pool="cpu"),
    Stage("autoencoder", "svd.training.autoencoder", ("curation",)),
    Stage("latents", "svd.latents.stage", ("curation", "autoencoder", "encoders")),
    Stage("image-pretraining", _TRAINING, ("latents", *_NETWORKS), "run_image_pretraining"),
    Stage("video-pretraining", _TRAINING, ("latents", *_NETWORKS, "image-pretraining"), "run_video_pretraining"),
    Stage(
        "high-quality-finetuning",
        _TRAINING,
        ("latents", *_NETWORKS, "video-pretraining"),
        "run_high_quality_finetuning",
        model="svd-text-to-video",
    ),
    Stage(
        "image-to-video",
        _TRAINING,
        ("latents", *_NETWORKS, "video-pretraining"),
        "run_image_to_video",
        model="svd-image-to-video",
    ),
    Stage("orbits", "svd.orbits.stage", pool="cpu"),
    Stage(
        "multiview-finetuning",
        _TRAINING,
        ("orbits", *_NETWORKS, "image-to-video"),
        "run_multiview_finetuning",
        model="svd-multi-view",
    ),
    Stage("ucf101-evaluation", "evaluation.frechet.ucf101", ("sources", *_NETWORKS, "high-quality-finetuning")),
    Stage("multiview-benchmark", "evaluation.multiview.benchmark", ("multiview-finetuning", *_NETWORKS)),
    Stage(
        "report",
        "evaluation.report.page",
        (
            "sources",
            "curation",
            "autoencoder",
            "latents",
            "image-pretraining",
            "video-pretraining",
            "high-quality-finetuning",
            "image-to-video",
            "multiview-finetuning",
            "ucf101-evaluation",
            "multiview-benchmark",
        ),
        pool="cpu",
    ),
    Stage(
        "camera-lora",
        _TRAINING,
        ("latents", *_NETWORKS, "image-to-video"),
        "run_camera_lora",
        model="svd-camera-lora",
        base="image-to-video",
    ),
    Stage(
        "frame-interpolation",
        _TRAINING,
        ("latents", *_NETWORKS, "high-quality-finetuning"),
        "run_frame_interpolation",
        model="svd-frame-interpolation",
    ),
    Stage("threshold-calibration", _CALIBRATION, ("curation", *_NETWORKS, "image-pretraining")),
)
STAGES = {stage.name: stage for stage in _LIST}
BRANCHES = ("camera-lora", "frame-interpolation", "threshold-calibration")
PIPELINE = tuple(name for name in STAGES if name not in BRANCHES)
# Their options may name files outside the project; flows/recording/inventory.py lists those for DVC.
EXTERNAL = (
    "sources",
    "encoders",
    "curation",
    "autoencoder",
    "image-pretraining",
    "orbits",
    "ucf101-evaluation",
    "multiview-benchmark",
    "threshold-calibration",
)
NIGHTLY = ("ucf101-evaluation", "multiview-benchmark", "report")


def find_stage(name: str) -> Stage:
    """The stage called `name`; raises UserError that lists the stages when there is none."""
    if name not in STAGES:
        raise UserError(f"no stage '{name}'; stages: {', '.join(STAGES)}")
    return STAGES[name]


@cache
def described(name: str) -> dict[str, Any]:
    """The entry of a stage in dvc.yaml or branches/dvc.yaml."""
    file = ROOT / ("branches/dvc.yaml" if name in BRANCHES else "dvc.yaml")
    return cast(dict[str, Any], yaml.safe_load(file.read_text())["stages"][name])


def preset_sections(stage: str) -> tuple[str, ...]:
    """The parts of a preset that a stage depends on, as dotted paths, as dvc.yaml lists them."""
    return tuple(key for group in described(stage).get("params", []) for keys in group.values() for key in keys)
