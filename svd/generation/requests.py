"""One form of request for every task, for callers that serve whichever model they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from svd.config import Sampling
from svd.generation.clips import image_to_video, multiview, text_to_video
from svd.generation.interpolating import interpolate
from svd.generation.models import Models
from svd.tasks.base import Task
from svd.tasks.image_to_video import IMAGE_TO_VIDEO
from svd.tasks.interpolation import INTERPOLATION, RATE
from svd.tasks.multiview import MULTIVIEW
from svd.tasks.signals import given
from svd.tasks.text_to_video import TEXT_TO_VIDEO


@dataclass(frozen=True)
class Request:
    """One clip to generate; a task reads the fields that it has columns for.

    images: (N, 3, height, width) in [0, 1], the one to start from, or first and last. frames: of the clip, or views of
    the orbit; interpolation makes five. fps: of the result.
    """

    sampling: Sampling
    seed: int
    frames: int
    height: int
    width: int
    fps: float
    motion_bucket: float
    prompt: str = ""
    images: Tensor | None = None
    elevation_degrees: float = 0.0


def generate_clip(models: Models, task: Task, request: Request) -> Tensor:
    """Generate the clip (T, 3, H, W) in [0, 1] of one request, without progress bars.

    Raises UserError when model and request don't fit.
    """
    return _GENERATE[task.name](models, request)


def _text_to_video(models: Models, request: Request) -> Tensor:
    return text_to_video(
        models,
        [request.prompt],
        frames=request.frames,
        height=request.height,
        width=request.width,
        fps=request.fps,
        motion_bucket=request.motion_bucket,
        sampling=request.sampling,
        seed=request.seed,
        progress=False,
    )[0]


def _image_to_video(models: Models, request: Request) -> Tensor:
    return image_to_video(
        models,
        given(request.images),
        frames=request.frames,
        height=request.height,
        width=request.width,
        fps=request.fps,
        motion_bucket=request.motion_bucket,
        sampling=request.sampling,
        seed=request.seed,
        guidance_range=(1.0, request.sampling.guidance),
        progress=False,
    )[0]


def _multiview(models: Models, request: Request) -> Tensor:
    return multiview(
        models,
        given(request.images),
        request.elevation_degrees,
        request.frames,
        sampling=request.sampling,
        seed=request.seed,
        fps=request.fps,
        motion_bucket=request.motion_bucket,
        progress=False,
    )[0]


def _interpolation(models: Models, request: Request) -> Tensor:
    return interpolate(
        models,
        given(request.images),
        fps=request.fps / RATE,
        motion_bucket=request.motion_bucket,
        sampling=request.sampling,
        seed=request.seed,
        progress=False,
    )


_GENERATE: Mapping[str, Callable[[Models, Request], Tensor]] = {
    TEXT_TO_VIDEO.name: _text_to_video,
    IMAGE_TO_VIDEO.name: _image_to_video,
    MULTIVIEW.name: _multiview,
    INTERPOLATION.name: _interpolation,
}
