"""A preset at which every stage of the system runs in seconds; the networks learn nothing."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TRAINED = (
    "image_pretraining",
    "video_pretraining",
    "high_quality_finetuning",
    "image_to_video",
    "multiview_finetuning",
)
TRAINED += ("camera_lora", "frame_interpolation", "threshold_calibration")
VALUES: dict[str, Any] = {
    "sources.paths": [],
    "sources.synthetic.train_videos": 4,
    "sources.synthetic.test_videos": 2,
    "sources.synthetic.scenes_per_video": 4,
    "sources.synthetic.height": 64,
    "sources.synthetic.width": 96,
    "sources.synthetic.fps": 12,
    "encoders.toy_iterations": 5,
    "curation.workers": 1,
    "curation.filters": {},
    "autoencoder.iterations": 4,
    "autoencoder.temporal_iterations": 2,
    "autoencoder.batch_size": 2,
    "latents.windows": 1,
    "high_quality_finetuning.subset": {},
    "threshold_calibration.clips": 4,
    "threshold_calibration.axes": ["motion"],
    "threshold_calibration.prompts": 2,
    "threshold_calibration.validation_samples": 8,
    "threshold_calibration.sampling.steps": 2,
    "orbits.objects": 4,
    "evaluation.ucf101.samples": 4,
    "evaluation.ucf101.controls": ["noise"],
    "evaluation.ucf101.sampling.steps": 2,
    "evaluation.multiview.objects": 1,
    "evaluation.multiview.sampling.steps": 2,
}


def micro_preset(name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The values of presets/tiny.yaml with everything made small, and with `changes` by dotted name."""
    values = yaml.safe_load((ROOT / "presets" / "tiny.yaml").read_text())
    for stage in TRAINED:
        often = {
            "validate_every": 10_000,
            "validation_samples": 2,
            "checkpoint_every": 5,
            "sample_steps": 2,
            "warmup": 1,
        }
        phases = [phase | {"iterations": 2, "batch_size": 2} for phase in values[stage]["phases"]]
        values[stage] = values[stage] | often | {"phases": phases}
    for dotted, value in (VALUES | {"name": name} | (changes or {})).items():
        *parents, last = dotted.split(".")
        functools.reduce(lambda section, key: section[key], parents, values)[last] = value
    return dict(values)
