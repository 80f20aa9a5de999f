"""The registered model as an MLflow pyfunc: prompts or pictures in, mp4 clips out."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd


class VideoModel(mlflow.pyfunc.PythonModel):
    """Loads the networks of a registered version; `predict` takes rows with a column `prompt` and returns mp4 bytes."""

    def load_context(self, context: Any) -> None:
        """Load U-Net, autoencoder and encoders from the version's artifacts."""
        from svd.config import Preset
        from svd.generate import load_models

        self._preset = Preset.model_validate(context.model_config["preset"])
        folders = {name: Path(path) for name, path in context.artifacts.items()}
        self._models = load_models(
            folders["model"] / "unet", folders["autoencoder"], folders["encoders"], self._preset.encoders, "cpu"
        )

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One base64 mp4 a row; `params` may hold `seed` and `frames`."""
        from svd.generate import text_to_video
        from svd.video import write_mp4

        options, ucf = params or {}, self._preset.evaluation.ucf101
        clips = text_to_video(
            self._models,
            list(model_input["prompt"]),
            frames=int(options.get("frames", ucf.frames)),
            height=ucf.height,
            width=ucf.width,
            fps=ucf.fps,
            motion_bucket=ucf.motion_bucket,
            sampling=ucf.sampling,
            seed=int(options.get("seed", 0)),
        )
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for clip in clips:
                path = Path(folder) / "clip.mp4"
                write_mp4(path, (clip.permute(0, 2, 3, 1) * 255).round().byte().numpy(), ucf.fps)
                rows.append(base64.b64encode(path.read_bytes()).decode())
        return pd.DataFrame({"mp4": rows})


mlflow.models.set_model(VideoModel())
