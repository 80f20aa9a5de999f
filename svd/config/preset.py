"""The options of the whole system: pydantic models of a preset. Here and in `svd/config/data.py` options are declared.

A preset is one YAML file (`presets/tiny.yaml`, `finetune.yaml`, `paper.yaml`), read by `svd/config/load.py`.
Section numbers refer to arXiv 2311.15127.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from svd.config.base import Fraction as Fraction
from svd.config.base import PositiveInt as PositiveInt
from svd.config.base import Renderer
from svd.config.base import Section as Section
from svd.config.data import CaptionsConfig as CaptionsConfig
from svd.config.data import ClipsConfig as ClipsConfig
from svd.config.data import CurationConfig as CurationConfig
from svd.config.data import CutPass as CutPass
from svd.config.data import CutsConfig as CutsConfig
from svd.config.data import EncodersConfig as EncodersConfig
from svd.config.data import FiltersConfig as FiltersConfig
from svd.config.data import MotionConfig as MotionConfig
from svd.config.data import SourcesConfig as SourcesConfig
from svd.config.data import SyntheticWorlds as SyntheticWorlds
from svd.config.data import TextConfig as TextConfig
from svd.config.data import Threshold as Threshold
from svd.config.evaluation import CalibrationConfig, EvaluationConfig
from svd.config.generation import GenerationConfig
from svd.config.model import ModelConfig
from svd.config.training import AutoencoderTraining, LatentsConfig, LoraConfig, MultiviewTraining, TrainingConfig


class OrbitsConfig(Section):
    """Rendered orbits for the multi-view finetuning (§4.5, D.6): full circles at constant elevation, random light."""

    objects: PositiveInt = 150_000
    meshes: list[str] = Field([], description="folders or files (GLB, OBJ); empty: procedural textured meshes")
    up: Literal["y", "z"] = Field("y", description="the upright axis of the mesh files (glTF: y)")
    views: PositiveInt = 21
    size: PositiveInt = 576
    min_elevation: float = Field(-5, ge=-90, le=90)
    max_elevation: float = Field(30, ge=-90, le=90)
    environments: list[str] = Field([], description="folders or files of .hdr light; empty: procedural skies")
    fov: float = Field(33.8, gt=0, lt=180, description="vertical field of view in degrees")
    radius: float = Field(2.0, gt=0, description="distance of the camera; the object's longest side is 1")
    renderer: Renderer = "auto"


class Preset(Section):
    """Everything that defines a run."""

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

    @model_validator(mode="after")
    def _phases_are_cached(self) -> Self:
        stages = ("image_pretraining", "video_pretraining", "high_quality_finetuning", "image_to_video")
        for stage in (*stages, "camera_lora", "frame_interpolation"):
            for number, phase in enumerate(getattr(self, stage).phases):
                if not any(geometry.serves(phase) for geometry in self.latents.geometries):
                    size = f"{phase.frames} frames of {phase.height}x{phase.width}"
                    raise ValueError(
                        f"'{stage}.phases.{number}' needs {size}, which no entry of 'latents.geometries' has"
                    )
        return self

    @model_validator(mode="after")
    def _images_join_text_to_video(self) -> Self:
        """Models that start from a picture are conditioned on one frame of a clip: unrelated images have none."""
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
            if (phase.frames, phase.height, phase.width) != (orbits.views, orbits.size, orbits.size):
                found = f"{phase.frames} frames of {phase.height}x{phase.width}"
                made = f"{orbits.views} views of {orbits.size}x{orbits.size}"
                raise ValueError(f"'multiview_finetuning.phases.{number}' has {found}, but 'orbits' renders {made}")
        return self
