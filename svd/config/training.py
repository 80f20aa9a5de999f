"""Options of the training stages, and of the latents that they read.

How a training is computed (devices, memory, intervals) stands in `svd/config/compute.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from svd.config.base import Fraction, PositiveInt, Section
from svd.config.model import Precision


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
        8, description="images per step; the temporal phase takes batch_size / frames clips"
    )
    frames: PositiveInt = 8
    height: PositiveInt = 256
    width: PositiveInt = 256
    learning_rate: float = Field(1e-4, gt=0)
    kl_weight: float = Field(1e-6, ge=0)
    squared_weight: float = Field(0.0, ge=0, description="weight of the mean squared error, beside L1")
    perceptual: Literal["stlpips-alex", "stlpips-vgg", "lpips-alex", "lpips-vgg"] = "stlpips-alex"
    perceptual_weights: list[str] = Field([], description="lpips-*: files of the backbone and of the linear layers")
    perceptual_weight: float = Field(0.25, ge=0)
    perceptual_frames: Annotated[int, Field(ge=0)] = Field(
        0, description="images per step that the perceptual loss sees; 0: all of them"
    )
    discriminator_weight: float = Field(0.5, ge=0)
    discriminator_start: int = Field(20001, description="step of the temporal phase from which its loss counts")
    discriminator_width: PositiveInt = 64
    precision: Precision = "32-true"


class Geometry(Section):
    """Frames, height and width of cached clips, in pixels."""

    frames: PositiveInt
    height: PositiveInt
    width: PositiveInt

    def serves(self, phase: Phase) -> bool:
        """Decide whether clips of this geometry can feed a phase: the same size and at least as many frames."""
        return (self.height, self.width) == (phase.height, phase.width) and self.frames >= phase.frames


class LatentsConfig(Section):
    """The latent cache: every kept clip, encoded once per geometry, at a frame rate drawn for the clip (§2, D.2)."""

    geometries: list[Geometry] = Field(min_length=1)
    min_fps: float = Field(5, gt=0)
    max_fps: float = Field(30, gt=0)
    windows: PositiveInt = Field(1, description="windows of frames cached from each clip, spread over its length")
    samples_per_shard: PositiveInt = Field(256, description="samples per file of the cache")

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
    buckets: list[Geometry] = Field(
        [],
        description="other lengths and sizes that train as well, in batches of their own: as many clips as have no "
        "more frames x latent positions than `batch_size` clips of the phase's own size",
    )
    batch_multiple: PositiveInt = Field(
        1, description="the batches of all buckets are multiples of it, for so many ranks x accumulation steps"
    )

    @model_validator(mode="after")
    def _buckets_keep_to_the_budget(self) -> Self:
        if self.batch_size % self.batch_multiple:
            raise ValueError(f"'batch_size' must be a multiple of 'batch_multiple', {self.batch_multiple}")
        sizes = [phase.size for phase in self.by_bucket]
        if twice := next((size for size in sizes if sizes.count(size) > 1), None):
            raise ValueError(f"{twice} are trained on twice; the phase's own size is no entry of 'buckets'")
        for phase in self.by_bucket:
            if not phase.batch_size:
                most = f"{self.batch_size} clips of {self.size}"
                raise ValueError(
                    f"'buckets': {self.batch_multiple} clips of {phase.size} have more tokens than {most}; raise "
                    "'batch_size' or lower 'batch_multiple'"
                )
        return self

    @property
    def size(self) -> str:
        """Length and size in words."""
        return f"{self.frames} frames of {self.height}x{self.width}"

    @property
    def by_bucket(self) -> list[Phase]:
        """The phase with each of its lengths and sizes alone, its own first; `batch_size` is that of the bucket."""
        tokens = self.frames * self.height * self.width  # their ratios are those of latent positions
        found = [self.model_copy(update={"buckets": []})]
        for bucket in self.buckets:
            clips = self.batch_size * tokens // (bucket.frames * bucket.height * bucket.width)
            size = clips // self.batch_multiple * self.batch_multiple
            found.append(found[0].model_copy(update={**bucket.model_dump(), "batch_size": size}))
        return found


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
    precision: Precision = Field("bf16-mixed", description="defines a result: it changes what is learned")
    validation_samples: PositiveInt = 256


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


class MultiviewTraining(TrainingConfig):
    """SVD-MV (§4.5, D.6): orbits of rendered objects, elevation as an additional conditioning."""

    initialisation: Literal["image-to-video", "image-model", "scratch"] = "image-to-video"
