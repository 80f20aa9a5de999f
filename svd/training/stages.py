"""The training stages of the paper, each a stage function over the same training runner (§3, §4, App. D).

image-pretraining (stage I) -> video-pretraining (II) -> high-quality-finetuning (III); from II image-to-video, from
that the camera-motion LoRAs and the multi-view model, and from III frame interpolation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from svd.config import Phase, Subset, TrainingConfig
from svd.core.errors import UserError
from svd.core.files import exclusive
from svd.latents.cache import LatentCache
from svd.latents.orbits import cache_orbits
from svd.model.formats.folders import load_autoencoder, load_unet
from svd.model.formats.hub import UNET_FILES, resolve
from svd.model.unet import UNet
from svd.stage import Report, StageContext
from svd.tasks.base import Task
from svd.tasks.image_to_video import IMAGE_TO_VIDEO
from svd.tasks.interpolation import FRAME_INTERPOLATION
from svd.tasks.multiview import MULTIVIEW
from svd.tasks.text_to_video import IMAGE, TEXT_TO_VIDEO
from svd.training.initialise import carry_over, fresh_unet, unet_config
from svd.training.launch import on_all_ranks
from svd.training.lora import train_loras
from svd.training.runner import Training, run_training

Rows = Callable[[Phase, str], Sequence[Mapping[str, Any]]]


@on_all_ranks("image_pretraining")
def run_image_pretraining(context: StageContext) -> Report:
    """Stage I: SD 2.1, or a fresh U-Net of its structure, learns EDM's noise schedule on single frames (§3.2, D.2).

    First only the time embedding trains, then everything. Inputs: latents, encoders, autoencoder.
    """
    training = _training(context, "image-pretraining", IMAGE, context.preset.image_pretraining, "")
    return run_training(training)


@on_all_ranks("video_pretraining")
def run_video_pretraining(context: StageContext) -> Report:
    """Stage II: temporal layers are put between the image layers and all train on the curated clips (§3.3, D.2).

    Inputs: latents, encoders, autoencoder, image-pretraining.
    """
    config = context.preset.video_pretraining
    return run_training(_training(context, "video-pretraining", TEXT_TO_VIDEO, config, "image-pretraining"))


@on_all_ranks("high_quality_finetuning")
def run_high_quality_finetuning(context: StageContext) -> Report:
    """Stage III: text-to-video at high resolution on the best clips (§3.4, §4.2, D.3); `subset` says which those are.

    Inputs: latents, encoders, autoencoder, video-pretraining.
    """
    config = context.preset.high_quality_finetuning
    return run_training(_training(context, "high-quality-finetuning", TEXT_TO_VIDEO, config, "video-pretraining"))


@on_all_ranks("image_to_video")
def run_image_to_video(context: StageContext) -> Report:
    """Image-to-video: text becomes the CLIP embedding of the first frame, whose noise-augmented latent joins the
    input (§4.2, D.4).

    Inputs: latents, encoders, autoencoder, video-pretraining.
    """
    config = context.preset.image_to_video
    return run_training(_training(context, "image-to-video", IMAGE_TO_VIDEO, config, "video-pretraining"))


@on_all_ranks("frame_interpolation")
def run_frame_interpolation(context: StageContext) -> Report:
    """Four times the frame rate: three frames between two given ones (§4.4, D.5).

    Inputs: latents, encoders, autoencoder, high-quality-finetuning.
    """
    config = context.preset.frame_interpolation
    training = _training(context, "frame-interpolation", FRAME_INTERPOLATION, config, "high-quality-finetuning")
    return run_training(training)


@on_all_ranks("camera_lora")
def run_camera_lora(context: StageContext) -> Report:
    """One LoRA on the temporal attention for each camera motion, trained on the clips that have it (§4.3.1, D.4.2).

    Inputs: latents, encoders, autoencoder, image-to-video.
    """
    training = _training(context, "camera-lora", IMAGE_TO_VIDEO, context.preset.camera_lora, "image-to-video")
    return train_loras(training, context.preset.camera_lora)


@on_all_ranks("multiview_finetuning")
def run_multiview_finetuning(context: StageContext) -> Report:
    """SVD-MV: orbits around objects from one view (§4.5, D.6); `initialisation` gives the paper's SD2.1-MV and
    Scratch-MV.

    Inputs: orbits, image-to-video, autoencoder, encoders; image-pretraining for the initialisation `image-model`.
    """
    config = context.preset.multiview_finetuning
    previous = {"image-to-video": "image-to-video", "image-model": "image-pretraining", "scratch": None}
    with exclusive(context.work / ".lock"):  # the first rank makes it, the others find it
        cache = LatentCache(cache_orbits(context, context.work / "latents"))
    return run_training(
        _training(context, "multiview-finetuning", MULTIVIEW, config, previous[config.initialisation], cache)
    )


def select(rows: pl.DataFrame, subset: Subset) -> pl.DataFrame:
    """Keep the samples on the right side of each axis' quantile over these samples; ties with the threshold stay."""
    kept = rows
    for column, share in (("motion_score", subset.min_motion), ("similarity", subset.min_similarity)):
        if share:
            kept = kept.filter(pl.col(column) >= rows[column].quantile(share, "lower"))
    if subset.max_text_area:
        kept = kept.filter(pl.col("text_area") <= rows["text_area"].quantile(1 - subset.max_text_area, "higher"))
    return kept


def _rows(cache: LatentCache, subset: Subset) -> Rows:
    """Training samples of the subset and all test samples."""

    def rows(phase: Phase, split: str) -> Sequence[Mapping[str, Any]]:
        found = cache.rows(phase, split)
        return (select(found, subset) if split == "train" else found).to_dicts()

    return rows


def _training(
    context: StageContext,
    name: str,
    task: Task,
    config: TrainingConfig,
    previous: str | None,
    cache: LatentCache | None = None,
) -> Training:
    """A stage's training with the usual choices; `previous` names the stage whose U-Net it starts from."""
    autoencoder = load_autoencoder(context.inputs["autoencoder"]).requires_grad_(False)
    cache = cache or LatentCache(context.inputs["latents"])
    phase = config.phases[-1]
    size = phase.height // autoencoder.factor, phase.width // autoencoder.factor

    def initial() -> UNet:
        unet = fresh_unet(unet_config(context.preset, task, size), context.preset.seed, name)
        source = _source(context, previous)
        return unet if source is None else carry_over(load_unet(source), unet, str(source))

    rows = _rows(cache, config.subset)
    compute = context.preset.compute.of(name)
    return Training(name, context, task, config, compute, cache, autoencoder, rows, initial, context.work)


def _source(context: StageContext, previous: str | None) -> Path | None:
    """Where the first weights are: the previous stage's output, else `model.pretrained`; None for fresh weights.

    `previous` "" names no stage, None asks for fresh weights whatever is there.
    """
    if previous is None:
        return None
    if previous in context.inputs:
        return context.inputs[previous] / "unet"
    pretrained = context.preset.model.pretrained
    if previous and pretrained is None:
        raise UserError(
            f"{context.output.name}: needs the output of the stage '{previous}', or weights in 'model.pretrained'"
        )
    return resolve(pretrained, UNET_FILES) if pretrained else None
