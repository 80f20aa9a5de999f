"""The registered model as an MLflow pyfunc: prompts or pictures in, mp4 clips out.

MLflow copies this file into every version and runs it there; the columns and parameters are in
`flows/serving/signature.py`.
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

from flows.serving.signature import section
from svd.config import Preset, Sampling
from svd.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from svd.tasks.api import Models

Values = Mapping[str, Any]


class VideoModel(mlflow.pyfunc.PythonModel):
    """Makes one clip of each row, as `svd generate` does with the preset that the networks were trained with."""

    def load_context(self, context: Any) -> None:
        """Load the networks from the version's artifacts, onto a GPU when there is one."""
        folders = {name: Path(path) for name, path in context.artifacts.items()}
        settings = json.loads(folders["settings"].read_text())
        self._task = str(settings["task"])
        self._preset = Preset.model_validate(settings["preset"])
        self._config = section(self._preset, self._task)
        self._models = self._load(folders)
        self._lock = threading.Lock()  # servers call from many threads; a request sets the scales of the LoRAs

    def _load(self, folders: Mapping[str, Path]) -> Models:
        import torch

        from svd.model.lora import load_lora
        from svd.tasks.api import load_models

        gpu = torch.cuda.is_available()
        models = load_models(
            folders.get("base", folders["model"]) / "unet",
            folders["autoencoder"],
            folders["encoders"],
            self._preset.encoders,
            "cuda" if gpu else "cpu",
            dtype=torch.bfloat16 if gpu else torch.float32,
            kind="edm-v" if self._config.objective == "edm" else "v",
        )
        if self._task == "camera-lora":
            for motion in self._preset.camera_lora.motions:
                load_lora(models.unet, folders["model"] / motion, motion)
            models.unet.to(models.device, models.dtype)
        return models

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A column `mp4` of base64 texts, one a row; raises MlflowException for values that can't be used."""
        make = {
            "high-quality-finetuning": self._from_text,
            "image-to-video": self._from_picture,
            "camera-lora": self._with_camera,
            "multiview-finetuning": self._orbit,
            "frame-interpolation": self._between,
        }[self._task]
        options, films = params or {}, []
        try:
            with self._lock:
                for number, row in enumerate(model_input.to_dict("records")):
                    clip = make(row, options, int(options["seed"]) + number)
                    films.append(_mp4(clip, float(options["fps"])))
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame({"mp4": films})

    def _from_text(self, row: Values, options: Values, seed: int) -> Tensor:
        from svd.tasks.api import text_to_video

        sampling = self._preset.evaluation.ucf101.sampling
        return text_to_video(self._models, [row["prompt"]], sampling=sampling, **self._size(options, seed))[0]

    def _from_picture(self, row: Values, options: Values, seed: int) -> Tensor:
        from svd.tasks.api import image_to_video

        sampling = self._sampling
        return image_to_video(
            self._models,
            self._picture(row, "image"),
            sampling=sampling,
            guidance_range=(1.0, sampling.guidance),
            **self._size(options, seed),
        )[0]

    def _with_camera(self, row: Values, options: Values, seed: int) -> Tensor:
        from svd.model.lora import set_scales

        motions: list[str] = [*self._preset.camera_lora.motions]
        if options["camera"] not in motions:
            raise UserError(f"no camera motion '{options['camera']}'; this version has {', '.join(motions)}")
        set_scales(self._models.unet, {options["camera"]: float(options["scale"])})
        return self._from_picture(row, options, seed)

    def _orbit(self, row: Values, options: Values, seed: int) -> Tensor:
        from svd.tasks.api import multiview

        return multiview(
            self._models,
            self._picture(row, "image"),
            float(row["elevation_degrees"]),
            int(options["frames"]),
            sampling=self._sampling,
            seed=seed,
            fps=float(options["fps"]),
            motion_bucket=float(options["motion_bucket"]),
            progress=False,
        )[0]

    def _between(self, row: Values, options: Values, seed: int) -> Tensor:
        import torch

        from svd.tasks.api import interpolate

        return interpolate(
            self._models,
            torch.cat([self._picture(row, "first"), self._picture(row, "last")]),
            fps=float(options["fps"]) / 4,  # of what is given; three frames come between
            motion_bucket=float(options["motion_bucket"]),
            sampling=self._sampling,
            seed=seed,
            progress=False,
        )

    @property
    def _sampling(self) -> Sampling:
        """Of everything that begins with pictures."""
        return self._preset.evaluation.multiview.sampling

    def _size(self, options: Values, seed: int) -> dict[str, Any]:
        """What text-to-video and image-to-video have in common."""
        phase = self._config.phases[-1]
        return {
            "frames": int(options["frames"]),
            "height": phase.height,
            "width": phase.width,
            "fps": float(options["fps"]),
            "motion_bucket": float(options["motion_bucket"]),
            "seed": seed,
            "progress": False,
        }

    def _picture(self, row: Values, column: str) -> Tensor:
        """The picture in a column, base64 or a data URL: (1, 3, H, W) in [0, 1], as large as the model was trained."""
        from svd.media.images import decode_image
        from svd.media.resize import cover

        try:
            content = base64.b64decode(str(row[column]).rpartition(",")[2], validate=True)
        except ValueError:
            raise UserError(f"column '{column}': no base64; give the base64 text of a PNG or JPEG file") from None
        phase = self._config.phases[-1]
        return cover(decode_image(content, f"column '{column}'")[None], phase.height, phase.width)


def _mp4(clip: Tensor, fps: float) -> str:
    """A clip (T, 3, H, W) in [0, 1] as the base64 text of an mp4."""
    from svd.media.clips import save_clip

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        save_clip(path, clip, fps)
        return base64.b64encode(path.read_bytes()).decode()


mlflow.models.set_model(VideoModel())
