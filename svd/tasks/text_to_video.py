"""Text to video (§4.1, D.2, D.3), and text to image, which is its first stage and has no temporal layers (§3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from svd.diffusion.guidance import Condition
from svd.latents.loader import Batch
from svd.model.autoencoder import Autoencoder
from svd.model.unet import UNet
from svd.tasks.base import Task
from svd.tasks.signals import ClipSignals, SignalEncoders, given, of_batch


def from_prompts(
    encoders: SignalEncoders,
    prompts: Sequence[str],
    *,
    frames: int,
    fps: float,
    motion_bucket: float,
    motion_prompt: str | None = None,
) -> tuple[ClipSignals, Tensor]:
    """Return the signals of a request, and the empty prompt's embedding (B, S, D) for `dropped`.

    motion_prompt: what the temporal layers read instead of the prompt (temporal prompting, E.5.4).
    """
    groups = [prompts, [""]] if motion_prompt is None else [prompts, [""], [motion_prompt]]
    text, *others = encoders.encode_texts(*groups)
    null, *motion = (embedding.expand(len(prompts), -1, -1) for embedding in others)
    signals = ClipSignals(frames, fps, motion_bucket, text=text, motion_text=motion[0] if motion else None)
    return signals, null


def _observe(batch: Batch, autoencoder: Autoencoder | None) -> ClipSignals:
    return of_batch(batch)


def _build(signals: ClipSignals, unet: UNet) -> Condition:
    """Condition on text, fps and motion; in a joint batch also on which clips are images (D.2, D.3)."""
    return Condition(
        given(signals.text),
        signals.ids(unet.config.ids),
        time_context=signals.motion_text,
        image_only=signals.image_only,
    )


TEXT_TO_VIDEO = Task(
    name="text-to-video",
    section="text_to_video",
    stages=("high-quality-finetuning", "video-pretraining", "threshold-calibration"),
    ids=2,
    observe=_observe,
    build=_build,
    columns={"prompt": "text"},
)

# Stage I: text alone (D.2).
IMAGE = replace(TEXT_TO_VIDEO, name="image", stages=("image-pretraining",), ids=0, temporal=False, columns={})
