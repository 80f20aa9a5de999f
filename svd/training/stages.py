"""The training stages of the paper, one function each, over the same runner (§3, §4, App. D).

image-pretraining (stage I) -> video-pretraining (II) -> high-quality-finetuning (III); from II image-to-video, from
that the camera-motion LoRAs and the multi-view model, and from III frame interpolation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl

from svd.catalogue.axes import SUBSET_AXES
from svd.config import Phase, Subset, TrainingConfig
from svd.core.errors import UserError
from svd.core.files import exclusive
from svd.latents.cache import LatentCache
from svd.latents.index import Rows
from svd.latents.orbits import cache_orbits
from svd.model.formats.folders import checkpoint_hash, load_autoencoder, load_unet
from svd.model.formats.hub import UNET_FILES, resolve_weights
from svd.model.unet import UNet
from svd.stage import Report, StageContext
from svd.tasks.base import Task
from svd.tasks.image_to_video import IMAGE_TO_VIDEO
from svd.tasks.interpolation import INTERPOLATION
from svd.tasks.multiview import MULTIVIEW
from svd.tasks.text_to_video import IMAGE, TEXT_TO_VIDEO
from svd.training.initialise import carry_over, fresh_unet, unet_config
from svd.training.launch import on_all_ranks
from svd.training.lora import train_loras
from svd.training.runner import Training, run_training


@on_all_ranks("image_pretraining")
def run_image_pretraining(context: StageContext) -> Report:
    """Run stage I: SD 2.1, or a fresh U-Net of its structure, learns EDM's noise schedule on single frames (§3.2, D.2).

    First only the time embedding trains, then everything. Inputs: latents, encoders, autoencoder.
    """
    training = _training(context, "image-pretraining", IMAGE, context.preset.image_pretraining, "")
    return run_training(training)


@on_all_ranks("video_pretraining")
def run_video_pretraining(context: StageContext) -> Report:
    """Run stage II: temporal layers join the image layers, and all train on the curated clips (§3.3, D.2).

    Inputs: latents, encoders, autoencoder, image-pretraining.
    """
    config = context.preset.video_pretraining
    return run_training(_training(context, "video-pretraining", TEXT_TO_VIDEO, config, "image-pretraining"))


@on_all_ranks("high_quality_finetuning")
def run_high_quality_finetuning(context: StageContext) -> Report:
    """Run stage III: text-to-video at high resolution on the best clips, those of `subset` (§3.4, §4.2, D.3).

    Inputs: latents, encoders, autoencoder, video-pretraining.
    """
    config = context.preset.high_quality_finetuning
    return run_training(_training(context, "high-quality-finetuning", TEXT_TO_VIDEO, config, "video-pretraining"))


@on_all_ranks("image_to_video")
def run_image_to_video(context: StageContext) -> Report:
    """Train image-to-video: the first frame's CLIP embedding replaces the text, its noisy latent joins the input (D.4).

    Inputs: latents, encoders, autoencoder, video-pretraining.
    """
    config = context.preset.image_to_video
    return run_training(_training(context, "image-to-video", IMAGE_TO_VIDEO, config, "video-pretraining"))


@on_all_ranks("frame_interpolation")
def run_frame_interpolation(context: StageContext) -> Report:
    """Train frame interpolation: three frames between two given ones (§4.4, D.5).

    Inputs: latents, encoders, autoencoder, high-quality-finetuning.
    """
    config = context.preset.frame_interpolation
    training = _training(context, "frame-interpolation", INTERPOLATION, config, "high-quality-finetuning")
    return run_training(training)


@on_all_ranks("camera_lora")
def run_camera_lora(context: StageContext) -> Report:
    """Train one LoRA of the temporal attention per camera motion, on the clips that have it (§4.3.1, D.4.2).

    Inputs: latents, encoders, autoencoder, image-to-video.
    """
    training = _training(context, "camera-lora", IMAGE_TO_VIDEO, context.preset.camera_lora, "image-to-video")
    return train_loras(training, context.preset.camera_lora)


@on_all_ranks("multiview_finetuning")
def run_multiview_finetuning(context: StageContext) -> Report:
    """Train SVD-MV: orbits from one view (§4.5, D.6); `initialisation` gives the paper's SD2.1-MV and Scratch-MV.

    Inputs: orbits, image-to-video, autoencoder, encoders; image-pretraining for the initialisation `image-model`.
    """
    config = context.preset.multiview_finetuning
    previous = {"image-to-video": "image-to-video", "image-model": "image-pretraining", "scratch": None}
    with exclusive(context.work / ".lock"):  # the first rank makes it, the others find it
        cache = LatentCache(cache_orbits(context, context.work / "latents"))
    return run_training(
        _training(context, "multiview-finetuning", MULTIVIEW, config, previous[config.initialisation], cache)
    )


def select_subset(rows: Rows, subset: Subset) -> Rows:
    """Keep the samples on the right side of each axis' quantile over these samples; ties with the threshold stay."""
    kept = rows
    for axis in SUBSET_AXES:
        share: float = getattr(subset, axis.option)
        if share and axis.side == "min":
            kept = kept.where(pl.col(axis.column) >= rows.column(axis.column).quantile(share, "lower"))
        elif share:
            kept = kept.where(pl.col(axis.column) <= rows.column(axis.column).quantile(1 - share, "higher"))
    return kept


def _rows(cache: LatentCache, subset: Subset) -> Callable[[Phase, str], Rows]:
    """Make the reader of rows: the training samples of the subset, and all test samples."""

    def rows(phase: Phase, split: str) -> Rows:
        found = cache.rows(phase, split)
        return select_subset(found, subset) if split == "train" else found

    return rows


def _training(
    context: StageContext,
    name: str,
    task: Task,
    config: TrainingConfig,
    previous: str | None,
    cache: LatentCache | None = None,
) -> Training:
    """Put a stage's training together; `previous` names the stage whose U-Net it starts from."""
    autoencoder = load_autoencoder(context.inputs["autoencoder"]).requires_grad_(False)
    cache = cache or LatentCache(context.inputs["latents"])
    cache.require_autoencoder(checkpoint_hash(context.inputs["autoencoder"]))
    phase = config.phases[-1]
    size = phase.height // autoencoder.factor, phase.width // autoencoder.factor

    source = _source(context, previous)

    def initial() -> UNet:
        sizes = unet_config(context.preset, task, size)
        unet = fresh_unet(sizes, context.preset.seed, name, context.preset.model.unet.position_gain)
        return unet if source is None else carry_over(load_unet(source), unet, str(source))

    rows = _rows(cache, config.subset)
    compute = context.preset.compute.of(name)
    work = context.work
    return Training(name, context, task, config, compute, cache, autoencoder, rows, initial, work, source=source)


def _source(context: StageContext, previous: str | None) -> Path | None:
    """Return where the first weights are: the previous stage's output, else `model.pretrained`; None: fresh weights.

    previous: "" when no stage comes before; None asks for fresh weights in any case.
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
    return resolve_weights(pretrained, UNET_FILES) if pretrained else None
