"""Three real training steps on the CPU; prints the peak of the allocator's bytes, as torch's profiler counts them.

Run in a process of its own: python measured_step.py STAGE CHECKPOINTING OPTIMIZER PRECISION ACCUMULATION
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile

from svd.config import Preset, TrainingConfig
from svd.config.load import load_preset
from svd.model.autoencoder import Autoencoder
from svd.model.lora import add_lora
from svd.model.unet import UNet
from svd.tasks.base import Task
from svd.tasks.registry import task_of_stage
from svd.training.callbacks import Averaging
from svd.training.initialise import autoencoder_config, fresh_unet, unet_config, with_checkpointing
from svd.training.module import Diffusion, select_parameters
from svd.training.planning.step import make_batch
from svd.training.runner import quiet

TINY = str(Path(__file__).resolve().parents[2] / "presets" / "tiny.yaml")


def preset_of(stage: str, checkpointing: str, optimizer: str, precision: str, parts: int) -> Preset:
    """The tiny preset with other ways to train a stage."""
    section = stage.replace("-", "_")
    changed: dict[str, Any] = {f"{section}.optimizer": optimizer, f"{section}.precision": precision}
    changed[f"compute.{section}"] = {"devices": 1, "checkpointing": checkpointing, "gradient_accumulation": parts}
    return load_preset(TINY, changed)


def build(preset: Preset, stage: str, task: Task, config: TrainingConfig) -> Diffusion:
    """What the stage trains, as it is when the trainer begins."""
    phase = config.phases[-1]
    autoencoder = Autoencoder(autoencoder_config(preset)).requires_grad_(False)
    size = phase.height // autoencoder.factor, phase.width // autoencoder.factor
    unet = with_checkpointing(
        fresh_unet(unet_config(preset, task, size), 0, stage), preset.compute.of(stage).checkpointing
    )

    def choose(unet: UNet) -> None:
        if stage == "camera-lora":
            add_lora(unet, preset.camera_lora.rank, preset.camera_lora.alpha, "zoom")
        else:
            select_parameters(unet, task, phase.trainable)

    return Diffusion(unet, task, config, phase, autoencoder, choose)


def train(stage: str, preset: Preset) -> None:
    """Take three steps with Lightning."""
    quiet()
    task = task_of_stage(stage)
    config: TrainingConfig = getattr(preset, stage.replace("-", "_"))
    parts = preset.compute.of(stage).gradient_accumulation
    clips = config.phases[-1].batch_size // parts

    def batches() -> Any:
        for number in range(3 * parts):
            shapes = make_batch(preset, task, config.phases[-1], clips)
            real = {
                k: torch.rand(v.shape) if v.is_floating_point() else v.new_zeros(v.shape) for k, v in shapes.items()
            }
            yield real | {"index": torch.full((clips,), number)}

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision=config.precision,
        max_steps=3,
        accumulate_grad_batches=parts,
        callbacks=[Averaging()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(build(preset, stage, task, config), batches())


def main() -> None:
    """Entry point."""
    stage, checkpointing, optimizer, precision, parts = sys.argv[1:]
    preset = preset_of(stage, checkpointing, optimizer, precision, int(parts))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(stage, preset)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    print(max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"))


if __name__ == "__main__":
    main()
