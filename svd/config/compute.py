"""Options that say how the stages are computed, apart from those that define their results.

An option belongs here when changing it leaves the result what it is by definition: on how many devices a stage runs,
how memory is traded for time, how often work in progress is saved and looked at. Sums of floating-point numbers may be
rounded otherwise; nothing else may differ in the weights, metrics and tables that a stage publishes. An option that
changes what is learned or written (`precision`, a phase's `batch_size`, `validation_samples`, `shard_bytes`) stays in
the section of its stage.

Nothing in this section reruns a stage: it enters neither the digest of a stage's work nor what DVC watches, and a
training that was killed goes on after it changed. Only what people look at follows some of these options: the rows of
`losses.csv` (`validate_every`) and the clips sampled beside the weights (`sample_steps`).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from svd.config.base import PositiveInt, Section

TRAININGS = (
    "image_pretraining",
    "video_pretraining",
    "high_quality_finetuning",
    "image_to_video",
    "camera_lora",
    "frame_interpolation",
    "threshold_calibration",
    "multiview_finetuning",
)


class TrainingCompute(Section):
    """Devices, memory and intervals of the training of a diffusion model."""

    devices: int | Literal["auto"] = Field("auto", description="processes per node, one per device; auto: every GPU")
    nodes: PositiveInt = Field(1, description="machines; a launcher (torchrun, srun) must start one process group each")
    strategy: Literal["auto", "ddp", "fsdp2"] = Field("auto", description="fsdp2 shards weights and optimiser state")
    context_ranks: PositiveInt = Field(
        1, description="ranks that share each clip, its frames and positions, when one's activations don't fit on one"
    )
    num_workers: Annotated[int, Field(ge=0)] = Field(0, description="processes per rank that load batches; 0: none")
    stream: bool = Field(
        False,
        description="read latents that this machine lacks from the store, by ranges, and bring no shard to its disk; "
        "'num_workers' read ahead",
    )
    gradient_accumulation: PositiveInt = Field(
        1, description="parts into which each rank splits its share of a batch; the batch itself stays `batch_size`"
    )
    checkpointing: Literal["none", "fine", "all"] = Field(
        "none", description="activations recomputed in the backward pass, which saves memory and costs time"
    )
    damaged_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01,
        description="share of the samples that may be missing or damaged, one at least; beyond it a training stops",
    )
    compile: bool = Field(False, description="compile the blocks of the U-Net with torch.compile")
    checkpoint_every: PositiveInt = Field(1000, description="steps between saved states, where a killed run goes on")
    keep_checkpoints: PositiveInt = Field(2, description="saved states that are kept, in case the newest is damaged")
    validate_every: PositiveInt = Field(1000, description="steps between measurements of the validation loss")
    sample_steps: PositiveInt = Field(25, description="sampling steps of the clips shown during and after training")


class AutoencoderCompute(Section):
    """Intervals of the training of the autoencoder."""

    checkpoint_every: PositiveInt = Field(100, description="steps between saved states, where a killed run goes on")


class CurationCompute(Section):
    """Processes of the curation."""

    workers: PositiveInt = Field(1, description="processes that decode and measure sources")


class LatentsCompute(Section):
    """Threads of the latent cache."""

    workers: PositiveInt = Field(1, description="threads that decode clips")


class Ucf101Compute(Section):
    """Batches of the UCF-101 evaluation."""

    batch_size: PositiveInt = Field(8, description="clips sampled and measured at once")


class EvaluationCompute(Section):
    """The evaluations, one section each."""

    ucf101: Ucf101Compute = Ucf101Compute()


class Prices(Section):
    """Prices of an hour: with them, every run also logs what it has cost."""

    currency: str = Field(min_length=1, description="for people, for example EUR")
    cpu_hour: float = Field(0.0, ge=0, description="of one core at work, not of one that waits")
    gpu_hour: float = Field(0.0, ge=0, description="of one GPU, at work or not")


class ComputeConfig(Section):
    """The section `compute`. A training stage takes from `training` what its own section doesn't set.

    >>> compute = ComputeConfig.model_validate({"training": {"devices": 8}, "camera_lora": {"compile": True}})
    >>> compute.of("camera-lora").devices, compute.of("camera-lora").compile, compute.of("image-to-video").compile
    (8, True, False)
    """

    curation: CurationCompute = CurationCompute()
    autoencoder: AutoencoderCompute = AutoencoderCompute()
    latents: LatentsCompute = LatentsCompute()
    training: TrainingCompute = Field(TrainingCompute(), description="what all training stages share")
    image_pretraining: TrainingCompute = TrainingCompute()
    video_pretraining: TrainingCompute = TrainingCompute()
    high_quality_finetuning: TrainingCompute = TrainingCompute()
    image_to_video: TrainingCompute = TrainingCompute()
    camera_lora: TrainingCompute = TrainingCompute()
    frame_interpolation: TrainingCompute = TrainingCompute()
    threshold_calibration: TrainingCompute = TrainingCompute()
    multiview_finetuning: TrainingCompute = TrainingCompute()
    evaluation: EvaluationCompute = EvaluationCompute()
    prices: Prices | None = Field(None, description="of the machines; none: only hours are logged")

    def of(self, stage: str) -> TrainingCompute:
        """Return the settings of a training stage, given its name (`image-to-video`) or its section's."""
        settings: TrainingCompute = getattr(self, stage.replace("-", "_"))
        return settings

    @model_validator(mode="after")
    def _inherit(self) -> Self:
        """Fill each training's section from `training`.

        It happens here, once, because a dumped preset spells out every default: later nobody could tell which values
        a stage had set itself.
        """
        shared = self.training.model_dump(exclude_unset=True)
        for name in TRAININGS:
            own = getattr(self, name).model_dump(exclude_unset=True)
            self.__dict__[name] = TrainingCompute.model_validate(shared | own)  # the model is frozen for others
        return self


def _moved() -> dict[str, str]:
    """Map each key that once stood in a stage's section to the sentence that says where it belongs now."""
    shared = ((section, key) for section in TRAININGS for key in TrainingCompute.model_fields)
    moved = {f"{section}.{key}": f" (or 'compute.training.{key}' for all trainings)" for section, key in shared}
    moved |= {"autoencoder.checkpoint_every": "", "evaluation.ucf101.batch_size": ""}
    moved["curation.workers"] = " (and 'compute.latents.workers' for the stage latents)"
    return {key: f"'{key}' moved to 'compute.{key}'{others}" for key, others in moved.items()}


MOVED = _moved()
