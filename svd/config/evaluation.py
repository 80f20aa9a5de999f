"""Options of the evaluations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from svd.config.base import Fraction, PositiveInt, Renderer, Section
from svd.config.generation import Sampling
from svd.config.training import TrainingConfig


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
    seeds: PositiveInt = Field(
        1, description="how many times the clips are sampled; the spread of the scores is reported"
    )
    controls: list[Literal["noise", "mean-frame", "untrained"]] = ["noise", "mean-frame"]
    shown: PositiveInt = Field(12, description="clips in the contact sheet and the report")


class MultiviewBenchmark(Section):
    """Multi-view benchmark on rendered objects (§4.5, Fig. 10). `None` takes the value of the protocol."""

    protocol: Literal["svd_gso_v1", "syncdreamer_gso_v1"] = "svd_gso_v1"
    meshes: list[str] = Field([], description="folders or files of GSO meshes; empty: held-out procedural meshes")
    style: Literal["patterned", "plain"] = Field("patterned", description="of procedural meshes, as in 'orbits'")
    up: Literal["y", "z"] = Field("z", description="the upright axis of the mesh files (GSO: z; glTF: y)")
    objects: PositiveInt = 50
    views: PositiveInt | None = None
    size: PositiveInt | None = None
    elevation: float | None = Field(None, ge=-90, le=90)
    renderer: Renderer = "auto"
    perceptual: Literal["lpips-alex", "lpips-vgg", "stlpips-alex", "stlpips-vgg"] = "lpips-vgg"
    lpips_weights: str | None = Field(None, description="file or folder: torchvision backbone and LPIPS v0.1")
    sampling: Sampling = Sampling(steps=25, guidance=2.5)


class RecognitionConfig(Section):
    """Recognition of what prompts ask for, on the synthetic worlds, whose truth is known.

    Clips have the frames and the size of the last phase of `high_quality_finetuning`.
    """

    prompts: PositiveInt = Field(64, description="captions of test scenes that are sampled, one clip each")
    training_clips: PositiveInt = Field(1500, description="real clips of the training worlds that the classifier sees")
    training_steps: PositiveInt = Field(300, description="batches of 32 clips that it is trained on")
    fps: float = Field(7, gt=0)
    motion_bucket: int = 127
    sampling: Sampling = Sampling()


class ImageToVideoEvaluation(Section):
    """Image-to-video on test clips of the latent cache: the first frame, the others, and the motion bucket."""

    clips: PositiveInt = Field(32, description="test clips whose first frame is animated")
    motion_clips: PositiveInt = Field(16, description="of them, those that are animated once per motion bucket")
    buckets: list[int] = Field([0, 64, 127, 191, 255], min_length=2, description="motion buckets, ascending")
    sampling: Sampling = Sampling(steps=25, guidance=2.5)


class BranchEvaluation(Section):
    """Camera LoRAs and frame interpolation on test clips of the latent cache."""

    lora_clips: PositiveInt = Field(32, description="test clips whose first frame each LoRA animates")
    lora_sampling: Sampling = Sampling(steps=25, guidance=2.5)
    interpolation_clips: PositiveInt = Field(32, description="test clips whose middle frames are made anew")
    interpolation_sampling: Sampling = Sampling(steps=25, guidance=2.5)


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
    votes: PositiveInt = Field(3, description="votes per pair, prompt and question")
    judge: Literal["people", "encoders"] = Field(
        "people", description="people vote on the page of `svd vote`; encoders: similarity and motion decide, for tests"
    )
    sampling: Sampling = Sampling(steps=50, guidance=12, solver="ddim")


class EvaluationConfig(Section):
    """The paper's evaluation (App. E)."""

    ucf101: Ucf101Config
    multiview: MultiviewBenchmark
    recognition: RecognitionConfig = RecognitionConfig()
    image_to_video: ImageToVideoEvaluation = ImageToVideoEvaluation()
    branches: BranchEvaluation = BranchEvaluation()
