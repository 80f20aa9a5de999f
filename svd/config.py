"""The options of the whole system: pydantic models of a preset. This is the one place where options are declared.

A preset is one YAML file (`presets/tiny.yaml`, `finetune.yaml`, `paper.yaml`), read by `svd/presets.py`.
Section numbers refer to arXiv 2311.15127.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]


class Section(BaseModel):
    """Base of every section: immutable, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SyntheticWorlds(Section):
    """Rendered, captioned videos whose cuts, motions and defects are known (svd/data/synthetic.py)."""

    train_videos: PositiveInt = 24
    test_videos: PositiveInt = 6
    scenes_per_video: PositiveInt = 10
    height: PositiveInt = 128
    width: PositiveInt = 192
    fps: PositiveInt = 24
    ucf101_clips_per_class: PositiveInt = 1


class SourcesConfig(Section):
    """Where raw videos come from: folders, globs, s3://, lists (CSV, Parquet, JSONL), WebDataset tars."""

    paths: list[str] = []
    synthetic: SyntheticWorlds | None = None
    sources_per_shard: PositiveInt = 64


class CutPass(Section):
    """One pass of the cut cascade (§3.1, App. C): a detector at its own frame rate and threshold."""

    detector: Literal["content", "adaptive", "hash", "histogram", "threshold", "transnetv2"] = "content"
    fps: float | None = Field(None, gt=0, description="None: every frame of the source")
    threshold: float = Field(gt=0)


class CutsConfig(Section):
    """Cascaded cut detection (§3.1)."""

    passes: list[CutPass]
    min_scene_seconds: float = Field(0.4, ge=0)


class ClipsConfig(Section):
    """Keyframe-aware clipping (App. C)."""

    min_seconds: float = Field(1.0, gt=0)
    max_seconds: float = Field(60.0, gt=0)
    no_keyframe: Literal["reencode", "drop"] = "reencode"


class MotionConfig(Section):
    """Optical flow (§3.1, App. C): Farnebäck at 2 fps, or RAFT at 800x450."""

    algorithm: Literal["farneback", "raft"] = "farneback"
    fps: float = Field(2.0, gt=0)
    short_side: PositiveInt = 64
    stored_short_side: PositiveInt = 16
    raft_weights: str | None = None


class TextConfig(Section):
    """Text detection on first, middle and last frame (App. C)."""

    detector: Literal["rapidocr", "craft"] = "rapidocr"
    craft_weights: str | None = None
    width: PositiveInt = 640
    height: PositiveInt = 352
    box_threshold: Fraction = 0.5


class EncodersConfig(Section):
    """Text and image encoders (§2, D.2). `toy-clip` is a small open_clip model trained on synthetic captions."""

    kind: Literal["open_clip", "toy-clip"] = "open_clip"
    model: str = "ViT-H-14"
    weights: str = "laion2b_s32b_b79k"
    sha256: str | None = None
    toy_iterations: PositiveInt = 300
    toy_width: PositiveInt = 64
    aesthetics_weights: str | None = None


class CaptionsConfig(Section):
    """Three captions a clip (§3.1): which captioners run, and with which probability training draws each (E.2.2)."""

    captioners: list[Literal["coca", "video", "llm", "sidecar", "motion"]]
    probabilities: dict[str, Fraction]
    coca_model: str = "coca_ViT-L-14"
    coca_weights: str = "mscoco_finetuned_laion2B-s13B-b90k"
    video_model: str | None = None
    llm_model: str | None = None
    llm_endpoint: str | None = None


class Threshold(Section):
    """Keep a clip when its score is on the right side of an absolute value or of a quantile of the catalogue."""

    absolute: float | None = None
    quantile: Fraction | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.absolute is None) == (self.quantile is None):
            raise ValueError("give exactly one of 'absolute' and 'quantile'")
        return self


class FiltersConfig(Section):
    """Per-axis filters (§3.3, E.2.2). `min_*` drop the low end, `max_*` the high end; a quantile is the share dropped."""

    min_motion: Threshold | None = None
    min_aesthetics: Threshold | None = None
    min_similarity: Threshold | None = None
    max_text_area: Threshold | None = None
    max_nsfw: Threshold | None = None
    max_duplicate_similarity: Threshold | None = None


class CurationConfig(Section):
    """The data engine (§3, App. C)."""

    cuts: CutsConfig
    clips: ClipsConfig
    motion: MotionConfig
    text: TextConfig
    captions: CaptionsConfig
    filters: FiltersConfig
    shard_bytes: PositiveInt = 1_000_000_000
    workers: PositiveInt = 1


class UNetSection(Section):
    """Sizes of the U-Net (§2, D.2); channels in and conditioning ids follow from the task."""

    block_out_channels: list[PositiveInt] = [320, 640, 1280, 1280]
    attention_levels: list[bool] = [True, True, True, False]
    layers_per_block: PositiveInt = 2
    head_channels: PositiveInt = 64
    cross_attention_dim: PositiveInt = 1024
    id_embedding_dim: PositiveInt = 256
    norm_eps: float = Field(1e-5, gt=0)


class AutoencoderSection(Section):
    """Sizes of the autoencoder; the down-sampling factor is 2 ** (levels - 1)."""

    block_out_channels: list[PositiveInt] = [128, 256, 512, 512]
    layers_per_block: PositiveInt = 2
    latent_channels: PositiveInt = 4
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
    batch_size: PositiveInt = 8
    frames: PositiveInt = 8
    height: PositiveInt = 256
    width: PositiveInt = 256
    learning_rate: float = Field(1e-4, gt=0)
    kl_weight: float = Field(1e-6, ge=0)
    perceptual_weight: float = Field(0.25, ge=0)
    discriminator_weight: float = Field(0.5, ge=0)
    discriminator_start: int = 20001
    precision: Precision = "32-true"


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


class TrainingConfig(Section):
    """A training stage: its phases in order, and what they share."""

    phases: list[Phase]
    min_fps: float = Field(5, gt=0)
    max_fps: float = Field(30, gt=0)
    objective: Literal["edm", "discrete-v"] = "edm"
    offset_noise: float = Field(0.0, ge=0)
    text_dropout: Fraction = 0.15
    image_dropout: Fraction = 0.1
    conditioning_p_mean: float = -3.0
    conditioning_p_std: float = Field(0.5, gt=0)
    ema_decay: Fraction | None = 0.9999
    ema_every: PositiveInt = 1
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    warmup: Annotated[int, Field(ge=0)] = 0
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
    sample_steps: PositiveInt = 25
    num_workers: Annotated[int, Field(ge=0)] = 0


class LoraConfig(TrainingConfig):
    """Camera-motion LoRA on the temporal attention blocks (§4.3.1, D.4.2)."""

    rank: PositiveInt = 16
    alpha: float = Field(16.0, gt=0)
    motions: list[Literal["horizontal", "zoom", "static"]] = ["horizontal", "zoom", "static"]


class MultiviewTraining(TrainingConfig):
    """SVD-MV (§4.5, D.6): orbits of rendered objects, elevation as an additional conditioning."""

    train_objects: PositiveInt = 150_000
    meshes: list[str] = Field([], description="folders or URIs of GLB/OBJ files; empty: procedural textured meshes")
    min_elevation: float = -5
    max_elevation: float = 30
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


class MultiviewBenchmark(Section):
    """Multi-view benchmark on GSO and MVImgNet (§4.5, Fig. 10)."""

    meshes: list[str] = Field([], description="GSO meshes; empty: held-out procedural meshes")
    objects: PositiveInt = 50
    views: PositiveInt = 21
    size: PositiveInt = 576
    elevation: float = 10.0
    fov: float = 33.8
    radius: float = 2.0
    renderer: Literal["moderngl", "pyvista", "cycles"] = "moderngl"
    perceptual: Literal["lpips-alex", "lpips-vgg", "stlpips-alex"] = "lpips-vgg"
    lpips_weights: str | None = None
    sampling: Sampling = Sampling(steps=25, guidance=2.5)


class EvaluationConfig(Section):
    """The paper's evaluation (App. E)."""

    ucf101: Ucf101Config
    multiview: MultiviewBenchmark


class Preset(Section):
    """Everything that defines a run."""

    name: str
    seed: int = 0
    sources: SourcesConfig
    curation: CurationConfig
    encoders: EncodersConfig
    model: ModelConfig
    autoencoder: AutoencoderTraining
    image_pretraining: TrainingConfig
    video_pretraining: TrainingConfig
    high_quality_finetuning: TrainingConfig
    image_to_video: TrainingConfig
    camera_lora: LoraConfig
    frame_interpolation: TrainingConfig
    multiview_finetuning: MultiviewTraining
    evaluation: EvaluationConfig
