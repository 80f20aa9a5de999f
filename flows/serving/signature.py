"""What the registered models take and give, by the stage that trained them: MLflow's pages and servers show it."""

from __future__ import annotations

from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from svd.config import Preset, TrainingConfig

COLUMNS: dict[str, dict[str, str]] = {
    "high-quality-finetuning": {"prompt": "string"},
    "image-to-video": {"image": "string"},
    "camera-lora": {"image": "string"},
    "multiview-finetuning": {"image": "string", "elevation_degrees": "double"},
    "frame-interpolation": {"first": "string", "last": "string"},
}


def section(preset: Preset, task: str) -> TrainingConfig:
    """The preset's section of the training stage `task`."""
    found: TrainingConfig = getattr(preset, task.replace("-", "_"))
    return found


def signature(preset: Preset, task: str) -> ModelSignature:
    """Columns and parameters of the model that the stage `task` trains; pictures and clips are base64 texts.

    Parameters, with the defaults of `svd generate`: `seed` (of the first row; row i has seed + i), `fps` (of the mp4)
    and `motion_bucket`; `frames` where a task leaves their number open (views of an orbit); `camera` and `scale` of a
    camera-motion LoRA.
    """
    params = [
        ParamSpec("seed", "long", 0),
        ParamSpec("fps", "double", 7.0),
        ParamSpec("motion_bucket", "double", 127.0),
    ]
    if task != "frame-interpolation":
        params.append(ParamSpec("frames", "long", section(preset, task).phases[-1].frames))
    if task == "camera-lora":
        params += [ParamSpec("camera", "string", preset.camera_lora.motions[0]), ParamSpec("scale", "double", 1.0)]
    return ModelSignature(
        inputs=Schema([ColSpec(kind, name) for name, kind in COLUMNS[task].items()]),
        outputs=Schema([ColSpec("string", "mp4")]),
        params=ParamSchema(params),
    )
