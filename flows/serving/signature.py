"""The inputs, parameters and outputs of registered models, as MLflow's pages and servers show them."""

from __future__ import annotations

from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from svd.config import Preset, TrainingConfig

# MLflow's type of a task's column; an image is the base64 text of its file.
TYPES = {"text": "string", "image": "string", "number": "double"}


def training_section(preset: Preset, stage: str) -> TrainingConfig:
    """Return the preset's section of a training stage."""
    found: TrainingConfig = getattr(preset, stage.replace("-", "_"))
    return found


def signature(preset: Preset, stage: str) -> ModelSignature:
    """Return the columns and parameters of the model that a stage trains; its output is an mp4 as base64 text.

    Parameters, with the defaults of `svd generate`: `seed` (of the first row; row i has seed + i), `fps` (of the mp4)
    and `motion_bucket`; `frames` where a task leaves their number open (views of an orbit); `camera` and `scale` of a
    camera-motion LoRA.
    """
    from svd.tasks.interpolation import INTERPOLATION  # imports torch
    from svd.tasks.registry import task_of_stage

    task = task_of_stage(stage)
    params = [
        ParamSpec("seed", "long", 0),
        ParamSpec("fps", "double", 7.0),
        ParamSpec("motion_bucket", "double", 127.0),
    ]
    if task is not INTERPOLATION:
        params.append(ParamSpec("frames", "long", training_section(preset, stage).phases[-1].frames))
    if stage == "camera-lora":
        params += [ParamSpec("camera", "string", preset.camera_lora.motions[0]), ParamSpec("scale", "double", 1.0)]
    return ModelSignature(
        inputs=Schema([ColSpec(TYPES[kind], name) for name, kind in task.columns.items()]),
        outputs=Schema([ColSpec("string", "mp4")]),
        params=ParamSchema(params),
    )
