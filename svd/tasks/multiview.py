"""Orbits around an object from one image (§4.5, D.6): image-to-video that is also given the camera's elevation.

View v = 0 … V - 1 is seen from azimuth 360 (v + 1) / V degrees, so the conditioning image is the last view.
"""

from __future__ import annotations

from svd.latents.loader import Batch
from svd.model.autoencoder import Autoencoder
from svd.tasks.base import RELEASED, Task
from svd.tasks.image_to_video import build_from_frame, observe_frame
from svd.tasks.signals import ClipSignals


def _observe(batch: Batch, autoencoder: Autoencoder | None) -> ClipSignals:
    return observe_frame(batch, autoencoder, token=-1)


MULTIVIEW = Task(
    name="multi-view",
    section="multiview",
    stages=("multiview-finetuning",),
    ids=4,
    observe=_observe,
    build=build_from_frame,
    pixels=True,
    one_token=True,
    columns={"image": "image", "elevation_degrees": "number"},
    sampling=RELEASED,
)
