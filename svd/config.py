"""The options of the whole system: pydantic models of a preset. Here and in `svd/config_data.py` options are declared.

A preset is one YAML file (`presets/tiny.yaml`, `finetune.yaml`, `paper.yaml`), read by `svd/presets.py`.
Section numbers refer to arXiv 2311.15127.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from svd.config_data import CaptionsConfig as CaptionsConfig
from svd.config_data import ClipsConfig as ClipsConfig
from svd.config_data import CurationConfig as CurationConfig
from svd.config_data import CutPass as CutPass
from svd.config_data import CutsConfig as CutsConfig
from svd.config_data import EncodersConfig as EncodersConfig
from svd.config_data import FiltersConfig as FiltersConfig
from svd.config_data import Fraction as Fraction
from svd.config_data import MotionConfig as MotionConfig
from svd.config_data import PositiveInt as PositiveInt
from svd.config_data import Section as Section
from svd.config_data import SourcesConfig as SourcesConfig
from svd.config_data import SyntheticWorlds as SyntheticWorlds
from svd.config_data import TextConfig as TextConfig
from svd.config_data import Threshold as Threshold

Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]


class UNetSection(Section):
    """Sizes of the U-Net (§2, D.2); channels in and conditioning ids follow from the task."""

    block_out_channels: list[PositiveInt] = [320, 640, 1280, 1280]
    attention_levels: list[bool] = [True, True, True, False]
    layers_per_block: PositiveInt = 2
    head_channels: PositiveInt = 64
    cross_attention_dim: PositiveInt = 1024
    id_embedding_dim: PositiveInt = 256
    norm_eps: float = Field(1e-5, gt=0)
    mixer: Literal["fixed", "learned", "learned_with_images"] = Field(
        "learned_with_images",
        description="weight of the image layers beside the temporal ones: fixed at 0.5 (which an export writes as what "
        "others can read), one learned number a block, or that and 1 for the images of a joint training",
    )


class AutoencoderSection(Section):
    """Sizes of the autoencoder; the down-sampling factor is 2 ** (levels - 1)."""

    block_out_channels: list[PositiveInt] = [128, 256, 512, 512]
    layers_per_block: PositiveInt = 2
    latent_channels: PositiveInt = 4
    norm_groups: PositiveInt = Field(32, description="groups of the normalisation; diffusers knows 32 alone")
    scaling_factor: float | None = Field(
        0.18215, gt=0, description="None: 1 / std of the latents, measured after training"
    )
    pretrained: str | None = None


class ModelConfig(Section):
    """Networks."""

    unet: UNetSection
    autoencoder: AutoencoderSection
    pretrained: str | None = Field(None, description="an SD 2.1 or SVD file, folder or hub id to start from")


class AutoencoderTraining(Section):
    """Training of the autoencoder, and of its temporal decoder with the encoder frozen (VideoLDM §3.1.1)."""

    train_encoder: bool = False
    iterations: Annotated[int, Field(ge=0)] = 0
    temporal_iterations: Annotated[int, Field(ge=0)] = 0
    optimizer: Literal["adam", "muon"] = Field("adam", description="of the image phase; muon: training from nothing")
    temporal_rate: float | None = Field(None, gt=0, description="learning rate of the temporal phase; None: the same")
    matrix_rate: float = Field(0.05, gt=0, description="muon: step of the weight matrices")
    crop: tuple[PositiveInt, PositiveInt] | None = Field(None, description="image phase: size of random crops")
    batch_size: PositiveInt = Field(
        8, description="pictures a step; the temporal phase takes batch_size / frames clips"
    )
    frames: PositiveInt = 8
    height: PositiveInt = 256
    width: PositiveInt = 256
    learning_rate: float = Field(1e-4, gt=0)
    kl_weight: float = Field(1e-6, ge=0)
    squared_weight: float = Field(0.0, ge=0, description="of the mean squared error, beside L1")
    perceptual: Literal["stlpips-alex", "stlpips-vgg", "lpips-alex", "lpips-vgg"] = "stlpips-alex"
    perceptual_weights: list[str] = Field([], description="lpips-*: files of the backbone and of the linear layers")
    perceptual_weight: float = Field(0.25, ge=0)
    perceptual_frames: Annotated[int, Field(ge=0)] = Field(0, description="pictures a step it sees; 0: all of them")
    discriminator_weight: float = Field(0.5, ge=0)
    discriminator_start: int = Field(20001, description="step of the temporal phase from which it is heard")
    discriminator_width: PositiveInt = 64
    checkpoint_every: PositiveInt = 100
    precision: Precision = "32-true"


class Geometry(Section):
    """Frames, height and width of cached clips, in pixels."""

    frames: PositiveInt
    height: PositiveInt
    width: PositiveInt

    def serves(self, phase: Phase) -> bool:
        """Whether a training phase can be fed from clips of this geometry (same size, at least as many frames)."""
        return (self.height, self.width) == (phase.height, phase.width) and self.frames >= phase.frames


class LatentsConfig(Section):
    """The latent cache: every kept clip, encoded once a geometry, at a frame rate drawn for the clip (§2, D.2)."""

    geometries: list[Geometry] = Field(min_length=1)
    min_fps: float = Field(5, gt=0)
    max_fps: float = Field(30, gt=0)
    windows: PositiveInt = Field(1, description="windows of frames cached from each clip, spread over its length")
    samples_per_shard: PositiveInt = 256

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_fps > self.max_fps:
            raise ValueError("'min_fps' must not exceed 'max_fps'")
        return self


class Phase(Section):
    """One phase of a training stage: a resolution, a number of iterations and a noise distribution (App. D)."""

    iterations: PositiveInt
    batch_size: PositiveInt
    height: PositiveInt
    width: PositiveInt
    frames: PositiveInt
    p_mean: float
    p_std: float = Field(gt=0)
    learning_rate: float = Field(gt=0)
    trainable: Literal["all", "time-embedding", "temporal"] = "all"
    image_share: Fraction = Field(0.0, description="text-to-video: share of clips replaced by as many unrelated images")


class Subset(Section):
    """Which cached clips a stage trains on: shares dropped at the low (`min_*`) or high end (`max_*`) of an axis."""

    min_motion: Fraction = 0.0
    min_similarity: Fraction = 0.0
    max_text_area: Fraction = 0.0


class TrainingConfig(Section):
    """A training stage: its phases in order, and what they share."""

    phases: list[Phase] = Field(min_length=1)
    subset: Subset = Subset()
    objective: Literal["edm", "discrete-v"] = "edm"
    offset_noise: float = Field(0.0, ge=0)
    text_dropout: Fraction = 0.15
    image_dropout: Fraction = 0.1
    conditioning_p_mean: float = -3.0
    conditioning_p_std: float = Field(0.5, gt=0)
    ema_decay: Fraction | None = 0.9999
    ema_every: PositiveInt = 1
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="of the network; muon: for training from nothing")
    matrix_rate: float = Field(0.02, gt=0, description="muon: learning rate of the matrices")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0, description="of adamw; muon has none")
    warmup: Annotated[int, Field(ge=0)] = 0
    decay: Literal["none", "cosine"] = "none"
    clip_norm: float | None = Field(1.0, gt=0)
    precision: Precision = "bf16-mixed"
    gradient_accumulation: PositiveInt = 1
    checkpointing: Literal["none", "fine", "all"] = "none"
    compile: bool = False
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: PositiveInt = 1
    validate_every: PositiveInt = 1000
    checkpoint_every: PositiveInt = 1000
    validation_samples: PositiveInt = 256
    sample_steps: PositiveInt = 25
    num_workers: Annotated[int, Field(ge=0)] = 0


class LoraConfig(TrainingConfig):
    """Camera-motion LoRA on the temporal attention blocks (§4.3.1, D.4.2)."""

    rank: PositiveInt = 16
    alpha: float = Field(16.0, gt=0)
    motions: list[Literal["horizontal", "zoom", "static"]] = ["horizontal", "zoom", "static"]

    @model_validator(mode="after")
    def _one_phase(self) -> Self:
        if len(self.phases) != 1:
            raise ValueError(f"a LoRA trains in one phase, got {len(self.phases)}")
        return self


Renderer = Literal["auto", "moderngl", "pyvista"]


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


class MultiviewTraining(TrainingConfig):
    """SVD-MV (§4.5, D.6): orbits of rendered objects, elevation as an additional conditioning."""

    initialisation: Literal["image-to-video", "image-model", "scratch"] = "image-to-video"


class Sampling(Section):
    """How clips are sampled for evaluation."""

    steps: PositiveInt = 50
    guidance: float = Field(7.0, ge=0)
    solver: Literal["euler", "heun", "dpmpp_2m", "ddim"] = "euler"
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(700.0, gt=0)
    rho: float = Field(7.0, gt=0)


class Ucf101Config(Section):
    """UCF-101 zero-shot Fréchet distance (E.4)."""

    dataset: str | None = Field(None, description="UCF-101 folder; None: the synthetic fixture")
    samples: PositiveInt = 13320
    frames: PositiveInt = 16
    fps: PositiveInt = 25
    motion_bucket: int = 127
    height: PositiveInt = 320
    width: PositiveInt = 576
    resized: tuple[PositiveInt, PositiveInt] = (240, 432)
    cropped: tuple[PositiveInt, PositiveInt] = (240, 320)
    features: Literal["i3d", "transnetv2", "videomae"] = "i3d"
    weights: str | None = None
    sha256: str | None = None
    sampling: Sampling = Sampling()
    batch_size: PositiveInt = 8
    seeds: PositiveInt = Field(1, description="how many times the clips are sampled; the scores' spread is reported")
    controls: list[Literal["noise", "mean-frame", "untrained"]] = ["noise", "mean-frame"]
    shown: PositiveInt = Field(12, description="clips in the picture and the report")


class MultiviewBenchmark(Section):
    """Multi-view benchmark on rendered objects (§4.5, Fig. 10). `None` takes the value of the protocol."""

    protocol: Literal["svd_gso_v1", "syncdreamer_gso_v1"] = "svd_gso_v1"
    meshes: list[str] = Field([], description="folders or files of GSO meshes; empty: held-out procedural meshes")
    up: Literal["y", "z"] = Field("z", description="the upright axis of the mesh files (GSO: z; glTF: y)")
    objects: PositiveInt = 50
    views: PositiveInt | None = None
    size: PositiveInt | None = None
    elevation: float | None = Field(None, ge=-90, le=90)
    renderer: Renderer = "auto"
    perceptual: Literal["lpips-alex", "lpips-vgg", "stlpips-alex", "stlpips-vgg"] = "lpips-vgg"
    lpips_weights: str | None = Field(None, description="file or folder: torchvision backbone and LPIPS v0.1")
    sampling: Sampling = Sampling(steps=25, guidance=2.5)


class CalibrationConfig(TrainingConfig):
    """Threshold calibration (§3.3, E.2.2): one small model per axis and share removed, ranked by votes."""

    clips: PositiveInt = 9_800_000
    axes: list[Literal["motion", "aesthetics", "similarity", "text_area", "captions"]] = [
        "similarity",
        "aesthetics",
        "text_area",
        "motion",
        "captions",
    ]
    removed: list[Fraction] = [0.0, 0.125, 0.25, 0.5]
    prompts: PositiveInt = 64
    votes: PositiveInt = Field(3, description="votes a pair, prompt and question")
    judge: Literal["people", "encoders"] = Field(
        "people", description="people vote on the page of `svd vote`; encoders: similarity and motion decide, for tests"
    )
    sampling: Sampling = Sampling(steps=50, guidance=12, solver="ddim")


class EvaluationConfig(Section):
    """The paper's evaluation (App. E)."""

    ucf101: Ucf101Config
    multiview: MultiviewBenchmark


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
