"""Records of one source: its facts, cuts with their evidence, clips with motion and sampled frames.

Times come in two forms. `pts` are integers in the `time_base` of the source's video stream and exact. Seconds are
pts × time_base, on the source's own clock, whose zero need not be the first frame. Ends are exclusive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np

from svd.media.orientation import Orientation

CutKind = Literal["hard", "fade", "dissolve", "black"]
ClipMethod = Literal["copy", "reencode"]
CameraLabel = Literal[
    "static",
    "pan-left",
    "pan-right",
    "tilt-up",
    "tilt-down",
    "zoom-in",
    "zoom-out",
    "roll",
    "handheld",
    "object-motion",
    "unknown",
]


Seconds = tuple[float, float]  # [start, end), from the first frame of a source


class SourceFailure(Exception):
    """A source that can't be analysed; `reason` is one readable line for the source's row in the catalogue."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class SourceFacts:
    """Facts of a source from its container, packets and decoded frames.

    width, height: coded size; display_width, display_height: size after orientation and pixel aspect.
    """

    container: str
    codec: str
    pixel_format: str
    transfer: str | None  # such as "bt709", "smpte2084" (PQ); None where the source doesn't say
    width: int
    height: int
    display_width: int
    display_height: int
    orientation: Orientation  # from the coded image to the shown one
    sample_aspect: Fraction  # width of a pixel in heights
    interlaced: bool
    fps: float  # frames / duration
    variable_frame_rate: bool
    time_base: Fraction
    start_pts: int
    end_pts: int
    duration: float  # seconds
    frames: int
    bit_rate: int  # bits per second of the video stream, from the sizes of its packets
    b_frames: bool
    keyframes: tuple[int, ...]  # pts, ascending
    warnings: tuple[str, ...] = ()
    decoded_share: float | None = None  # of the duration that the header declares; None where it declares none


@dataclass(frozen=True)
class Cut:
    """A boundary between two shots, with its evidence.

    frame: index (display order) of the first frame of the new shot. [start_frame, end_frame) is the transition: it is
    empty for a hard cut and belongs to no clip. score: value of the detector at the cut, compared with `threshold`.
    """

    kind: CutKind
    frame: int
    start_frame: int
    end_frame: int
    pts: int
    seconds: float
    start_seconds: float
    end_seconds: float
    detector: str  # detector and frame rate of the pass that found it, such as "content@24"
    score: float
    threshold: float


@dataclass(frozen=True)
class ClipSpan:
    """The frames of the source that a clip holds, and how it is written.

    [shot_start_frame, shot_end_frame) is the whole shot, before its ends moved to keyframes. `start_cut` and `end_cut`
    are indices into `SourceAnalysis.cuts`; None at the ends of the source and where a long shot was split. listed: the
    index of the span of a list that holds the clip, and the shot is the part of it in that span; None without spans.
    fps: frames per second by the distances of its own frames. variable_rate: whether these differ much.
    """

    start_frame: int
    end_frame: int
    start_pts: int
    end_pts: int
    start_seconds: float
    end_seconds: float
    frames: int
    method: ClipMethod
    shot_start_frame: int
    shot_end_frame: int
    start_cut: int | None = None
    end_cut: int | None = None
    listed: int | None = None
    fps: float = 0.0
    variable_rate: bool = False


@dataclass(frozen=True)
class CameraMotion:
    """Camera label of a clip, with the robust global fit behind it (medians over the sampled pairs).

    pan, tilt: apparent camera speed in frame widths per second (pan > 0: the camera turns right, tilt > 0: up).
    zoom: natural logarithm of the scale, per second (> 0: in). roll: radians per second (> 0: clockwise).
    shake: high-frequency part of the translation, in frame widths per second. residual: mean flow that the fit leaves,
    in frame widths per second. moving: share of the area that does not follow the fit.
    """

    label: CameraLabel
    confidence: float
    pan: float = 0.0
    tilt: float = 0.0
    zoom: float = 0.0
    roll: float = 0.0
    shake: float = 0.0
    residual: float = 0.0
    moving: float = 0.0


@dataclass(frozen=True)
class ClipAnalysis:
    """One clip of a source.

    motion_score: mean magnitude of the flow over time and space (§3.1), in pixels of the stored map per sample step.
    flow: (P, h, w, 2) float16, dx and dy between P pairs of samples, in pixels of the stored map (short side 16).
    frames: first, middle and last sample, (3, H, W, 3) uint8 RGB, upright, square pixels, at most 768 px wide.
    text_areas: share of each of the three frames that text covers, in [0, 1]; empty before text detection.
    scores: score by axis name, of the axes that are measured; empty before they are computed.
    """

    span: ClipSpan
    motion_score: float
    flow: np.ndarray
    camera: CameraMotion
    frames: np.ndarray
    frame_seconds: tuple[float, float, float]
    text_areas: tuple[float, ...] = ()
    scores: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class DroppedSpan:
    """Frames of the source that no clip holds, with the reason. Every frame is in a clip or in a dropped span."""

    start_frame: int
    end_frame: int
    start_pts: int
    end_pts: int
    start_seconds: float
    end_seconds: float
    reason: str  # "transition: fade", "shorter than 0.8 s", "before the next keyframe", "no usable keyframe", …


@dataclass(frozen=True)
class SourceAnalysis:
    """Everything that one decode pass finds in a source.

    inherited: how many of the first cuts belong to the part before, which lists them; 0 for whole sources.
    """

    facts: SourceFacts
    cuts: list[Cut]
    clips: list[ClipAnalysis]
    dropped: list[DroppedSpan]
    timing: dict[str, float] = field(
        default_factory=dict
    )  # CPU seconds by step; for benchmarks, never part of an output
    inherited: int = 0


@dataclass(frozen=True)
class ClipFile:
    """A written clip; its file has `bytes` bytes and decodes to exactly `frames` frames.

    width, height: size of the picture that players show. rotation: degrees by which they turn its frames clockwise.
    """

    frames: int
    bytes: int
    method: ClipMethod
    width: int
    height: int
    duration: float
    codec: str
    pixel_format: str
    transfer: str | None
    sample_aspect: Fraction = Fraction(1)
    rotation: int = 0
    interlaced: bool = False
