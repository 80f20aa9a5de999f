"""The preset as a whole: its sections, and the rules that hold between them."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from svd.config.base import Section
from svd.config.compute import ComputeConfig
from svd.config.data import CurationConfig, EncodersConfig, OrbitsConfig, SourcesConfig
from svd.config.evaluation import CalibrationConfig, EvaluationConfig
from svd.config.generation import GenerationConfig
from svd.config.model import ModelConfig
from svd.config.training import AutoencoderTraining, LatentsConfig, LoraConfig, MultiviewTraining, TrainingConfig


class Preset(Section):
    """Everything that defines a run, and in `compute` how it is computed."""

    name: str = Field(pattern=r"^\w[\w.-]*$", description="names the folders of its results")
    seed: int = 0
    sources: SourcesConfig
    curation: CurationConfig
    encoders: EncodersConfig
    model: ModelConfig
    autoencoder: AutoencoderTraining
    latents: LatentsConfig
    image_pretraining: TrainingConfig
    video_pretraining: TrainingConfig
    high_quality_finetuning: TrainingConfig
    image_to_video: TrainingConfig
    camera_lora: LoraConfig
    frame_interpolation: TrainingConfig
    threshold_calibration: CalibrationConfig
    orbits: OrbitsConfig
    multiview_finetuning: MultiviewTraining
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig
    licences: dict[str, str] = Field(
        {},
        description="of released weights, for model cards: by the name in `pretrained` or `encoders.weights`, for "
        "files without their folder; a change reruns nothing",
    )
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _phases_are_cached(self) -> Self:
        stages = ("image_pretraining", "video_pretraining", "high_quality_finetuning", "image_to_video")
        for stage in (*stages, "camera_lora", "frame_interpolation"):
            for number, phase in enumerate(getattr(self, stage).phases):
                for size in phase.by_bucket:
                    if not any(geometry.serves(size) for geometry in self.latents.geometries):
                        raise ValueError(
                            f"'{stage}.phases.{number}' needs {size.size}, which no entry of 'latents.geometries' has"
                        )
        return self

    @model_validator(mode="after")
    def _images_join_text_to_video(self) -> Self:
        """Allow images in the training of text-to-video alone.

        The other models are conditioned on a frame of the clip, which an unrelated image doesn't have.
        """
        joint = ("video_pretraining", "high_quality_finetuning", "threshold_calibration")
        for stage in (name for name in type(self).model_fields if isinstance(getattr(self, name), TrainingConfig)):
            for number, phase in enumerate(getattr(self, stage).phases):
                if phase.image_share and stage not in joint:
                    raise ValueError(f"'{stage}.phases.{number}.image_share': only {', '.join(joint)} mix in images")
                if phase.image_share and self.model.unet.mixer != "learned_with_images":
                    raise ValueError(
                        f"'{stage}.phases.{number}.image_share' needs 'model.unet.mixer: learned_with_images'"
                    )
        return self

    @model_validator(mode="after")
    def _orbits_are_rendered(self) -> Self:
        orbits = self.orbits
        for number, phase in enumerate(self.multiview_finetuning.phases):
            for size in phase.by_bucket:
                if (size.frames, size.height, size.width) != (orbits.views, orbits.size, orbits.size):
                    made = f"{orbits.views} views of {orbits.size}x{orbits.size}"
                    raise ValueError(
                        f"'multiview_finetuning.phases.{number}' has {size.size}, but 'orbits' renders {made}"
                    )
        return self
