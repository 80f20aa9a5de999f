"""Image to video (§4.2, D.4): text gives way to one image, as CLIP token and, with noise, as latent channels.

The camera-motion LoRAs (§4.3.1, D.4.2) are this task with adapters in its temporal attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from svd.diffusion.guidance import Condition
from svd.latents.loader import Batch
from svd.model.autoencoder import Autoencoder, posterior_mean
from svd.model.unet import UNet
from svd.tasks.base import RELEASED, Task
from svd.tasks.signals import ClipSignals, SignalEncoders, Values, given, kept, noise_augment, of_batch, with_noise


def from_images(
    encoders: SignalEncoders,
    images: Tensor,
    *,
    frames: int,
    fps: Values,
    motion_bucket: Values,
    cond_aug: float,
    generators: Sequence[torch.Generator],
    elevation_degrees: Values = 0.0,
) -> ClipSignals:
    """Return the signals of a request: images (B, 3, H, W) in [-1, 1], the first frames of the clips.

    cond_aug: standard deviation of the noise on the pixels, drawn from the clips' `generators`.
    """
    noisy = noise_augment(images, torch.full((len(images),), cond_aug), generators)
    return ClipSignals(
        frames,
        fps,
        motion_bucket,
        cond_aug,
        elevation_degrees,
        image=encoders.encode_images(images)[:, None],
        latents=encoders.encode_frames(noisy[:, None]),
    )


def observe_frame(batch: Batch, autoencoder: Autoencoder | None, token: int) -> ClipSignals:
    """Return the signals of a training batch; `token` is the number of the conditioning frame among the T.

    Raises ValueError without an autoencoder.
    """
    if autoencoder is None:
        raise ValueError("a task with a conditioning frame needs the autoencoder")
    noisy = with_noise(batch["frame"], batch["conditioning_sigma"], batch["frame_noise"])
    with torch.no_grad():
        moments = autoencoder.encode(noisy[:, None].to(next(autoencoder.parameters()).dtype))
    signals = replace(of_batch(batch), image=batch["image"][:, [token]], latents=posterior_mean(moments).float())
    return kept(signals, batch["keep_image"], batch["keep_concat"])


def _observe(batch: Batch, autoencoder: Autoencoder | None) -> ClipSignals:
    return observe_frame(batch, autoencoder, token=0)


def build_from_frame(signals: ClipSignals, unet: UNet) -> Condition:
    """Condition on the frame's CLIP token and on its latent, copied to all T frames (D.4)."""
    latents = given(signals.latents).expand(-1, signals.frames, -1, -1, -1)
    return Condition(given(signals.image), signals.ids(unet.config.ids), latents)


IMAGE_TO_VIDEO = Task(
    name="image-to-video",
    section="image_to_video",
    stages=("image-to-video", "camera-lora"),
    ids=3,
    observe=_observe,
    build=build_from_frame,
    pixels=True,
    one_token=True,
    columns={"image": "image"},
    sampling=RELEASED,
)
