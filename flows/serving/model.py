"""The registered model as an MLflow pyfunc: prompts or images in, mp4 clips out.

MLflow copies this file into every version and runs it there. The columns stand in the task's file in svd/tasks, the
parameters in `flows/serving/signature.py`.
"""

from __future__ import annotations

import base64
import json
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow.pyfunc
import pandas as pd
from mlflow.exceptions import MlflowException

from flows.serving.signature import training_section
from svd.config import Preset
from svd.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from svd.generation import Models
    from svd.generation.requests import Request

Values = Mapping[str, Any]


class VideoModel(mlflow.pyfunc.PythonModel):
    """Generates one clip per row, as `svd generate` does with the preset that the networks were trained with."""

    def load_context(self, context: Any) -> None:
        """Load the networks from the version's artifacts, onto a GPU when there is one."""
        from svd.tasks.registry import task_of_stage

        folders = {name: Path(path) for name, path in context.artifacts.items()}
        settings = json.loads(folders["settings"].read_text())
        self._stage = str(settings["task"])
        self._task = task_of_stage(self._stage)
        self._preset = Preset.model_validate(settings["preset"])
        self._config = training_section(self._preset, self._stage)
        self._models = self._load(folders)
        self._lock = threading.Lock()  # servers call from many threads; a request sets the scales of the LoRAs

    def _load(self, folders: Mapping[str, Path]) -> Models:
        import torch

        from svd.core.device import pick_device
        from svd.diffusion.edm import KINDS
        from svd.generation import load_models
        from svd.model.lora import load_lora

        device = pick_device()
        models = load_models(
            folders.get("base", folders["model"]) / "unet",
            folders["autoencoder"],
            folders["encoders"],
            self._preset.encoders,
            device,
            dtype=torch.float32 if device == "cpu" else torch.bfloat16,
            kind=KINDS[self._config.objective],
        )
        if self._stage == "camera-lora":
            for motion in self._preset.camera_lora.motions:
                load_lora(models.unet, folders["model"] / motion, motion)
            models.unet.to(models.device, models.dtype)
        return models

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return a column `mp4` of base64 texts, one per row; raise MlflowException for values that can't be used."""
        from svd.generation.requests import generate_clip

        options, films = params or {}, []
        try:
            with self._lock:
                for number, row in enumerate(model_input.to_dict("records")):
                    request = self._request(row, options, int(options["seed"]) + number)
                    if self._stage == "camera-lora":
                        self._choose_camera(str(options["camera"]), float(options["scale"]))
                    films.append(_mp4(generate_clip(self._models, self._task, request), request.fps))
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame({"mp4": films})

    def _request(self, row: Values, options: Values, seed: int) -> Request:
        """Read a row by the kinds of the task's columns; sizes are those of the last training phase."""
        import torch

        from svd.generation.requests import Request

        columns, phase = self._task.columns, self._config.phases[-1]
        images = [self._image(row, name) for name, kind in columns.items() if kind == "image"]
        values: dict[str, Any] = {name: row[name] for name, kind in columns.items() if kind == "text"}
        values |= {name: float(row[name]) for name, kind in columns.items() if kind == "number"}
        return Request(
            sampling=self._task.preset_sampling(self._preset),
            seed=seed,
            frames=int(options.get("frames", phase.frames)),
            height=phase.height,
            width=phase.width,
            fps=float(options["fps"]),
            motion_bucket=float(options["motion_bucket"]),
            images=torch.cat(images) if images else None,
            **values,
        )

    def _choose_camera(self, motion: str, scale: float) -> None:
        from svd.model.lora import set_scales

        motions: list[str] = [*self._preset.camera_lora.motions]
        if motion not in motions:
            raise UserError(f"no camera motion '{motion}'; this version has {', '.join(motions)}")
        set_scales(self._models.unet, {motion: scale})

    def _image(self, row: Values, column: str) -> Tensor:
        """Return the image in a column, base64 or a data URL: (1, 3, H, W) in [0, 1], at the size of the training."""
        from svd.media.images import decode_image
        from svd.media.resize import cover

        try:
            content = base64.b64decode(str(row[column]).rpartition(",")[2], validate=True)
        except ValueError:
            raise UserError(f"column '{column}': no base64; give the base64 text of a PNG or JPEG file") from None
        phase = self._config.phases[-1]
        return cover(decode_image(content, f"column '{column}'")[None], phase.height, phase.width)


def _mp4(clip: Tensor, fps: float) -> str:
    """Return a clip (T, 3, H, W) in [0, 1] as the base64 text of an mp4."""
    from svd.media.clips import save_clip

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        save_clip(path, clip, fps)
        return base64.b64encode(path.read_bytes()).decode()


mlflow.models.set_model(VideoModel())
