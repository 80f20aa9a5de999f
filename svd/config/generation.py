"""Options of sampling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from svd.config.base import PositiveInt, Section


class Sampling(Section):
    """How clips are sampled: solver, steps and range of noise levels (§2), guidance scale (D.4.1).

    sigma_max: the noise level at which sampling starts. rho: curvature of the schedule (EDM, arXiv 2206.00364, Eq. 5).
    """

    steps: PositiveInt = 50
    guidance: float = Field(7.0, ge=0)
    solver: Literal["euler", "heun", "dpmpp_2m", "ddim"] = "euler"
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(700.0, gt=0)
    rho: float = Field(7.0, gt=0)
