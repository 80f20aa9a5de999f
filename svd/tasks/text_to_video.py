"""Text to image and text to video (§4.1, D.2, D.3)."""

from __future__ import annotations

from svd.diffusion.guidance import Condition
from svd.latents.loader import Batch
from svd.model.autoencoder import Autoencoder
from svd.model.unet import UNet
from svd.tasks.base import Task
from svd.tasks.signals import text_ids


def _image(batch: Batch, unet: UNet, autoencoder: Autoencoder | None) -> Condition:
    """Stage I: text alone (D.2)."""
    return Condition(batch["text"])


def _text_to_video(batch: Batch, unet: UNet, autoencoder: Autoencoder | None) -> Condition:
    """Stages II and III: text, fps, motion (D.2, D.3); in a joint batch also which clips are images."""
    return Condition(batch["text"], text_ids(batch), image_only=batch.get("image_only"))


IMAGE = Task("image", 4, 0, _image, temporal=False)


TEXT_TO_VIDEO = Task("text-to-video", 4, 2, _text_to_video)
