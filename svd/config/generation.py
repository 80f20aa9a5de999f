"""Options of sampling, and which of them each task is generated with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from svd.config.base import PositiveInt, Section

# The functions of these names stand in svd/diffusion/sampler.py.
Solver = Literal["euler", "heun", "dpmpp_2m", "ddim"]
# How guidance changes over the frames of a clip (D.4.1, Fig. 16).
Ramp = Literal["constant", "linear", "triangle"]


class Sampling(Section):
    """How clips are sampled: solver, steps and range of noise levels (§2), guidance scale (D.4.1).

    sigma_max: the noise level at which sampling starts. rho: curvature of the schedule (EDM, arXiv 2206.00364, Eq. 5).
    """

    steps: PositiveInt = 50
    guidance: float = Field(7.0, ge=0)
    solver: Solver = "euler"
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(700.0, gt=0)
    rho: float = Field(7.0, gt=0)


class TaskGeneration(Section):
    """The defaults of one task in `svd generate`, in registered models and in the previews of its trainings."""

    sampling: Sampling | None = Field(None, description="None: the task's own default, see svd/tasks")


class GenerationConfig(Section):
    """Generation, task by task. The evaluations have a `sampling` of their own, which is part of their protocol."""

    text_to_video: TaskGeneration = TaskGeneration()
    image_to_video: TaskGeneration = TaskGeneration()
    multiview: TaskGeneration = TaskGeneration()
    interpolation: TaskGeneration = TaskGeneration()
