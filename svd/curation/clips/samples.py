"""Samples of the decoded frames: sparse images for text and similarity, and flow maps between samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from svd.config import MotionConfig
from svd.curation.base.types import CameraMotion, ClipSpan
from svd.curation.cuts.frame_scores import Clock
from svd.curation.decoding.decoder import FRAME_WIDTH, DecodedFrame, Planes, halve, to_rgb
from svd.curation.motion.camera import GlobalFit, classify, fit_similarity
from svd.curation.motion.flow import Flow, farneback, flow_function, grid_size, motion_score, stored_flow
from svd.media.orientation import UPRIGHT, Orientation
from svd.media.shown import Showing

FRAMES_PER_SECOND = 4.0  # frames that are kept for text, similarity and thumbnails
KEY_SPACING = 0.12  # seconds; a keyframe is not kept when a kept frame is nearer than this
KEPT_WIDTH = 1280  # wider frames are halved before they are kept
MAX_KEPT = 120_000_000  # bytes of kept frames of one shot; above it every second frame of its past is dropped


@dataclass(frozen=True)
class KeptFrame:
    """A sampled frame: number, time, and planes at most KEPT_WIDTH wide, as coded (not yet turned upright)."""

    frame: int
    seconds: float
    planes: Planes


@dataclass(frozen=True)
class FlowPair:
    """The flow between two samples: frame numbers, seconds between, stored map (h, w, 2) float16, and global fit."""

    before: int
    after: int
    seconds: float
    flow: np.ndarray
    fit: GlobalFit


def sampled_times(config: MotionConfig, pts: np.ndarray, time_base: float) -> list[int]:
    """Return those of the ascending timestamps `pts` at which a Sampler takes a sample."""
    clocks = Clock(FRAMES_PER_SECOND), Clock(config.fps)
    return [t for t in pts.tolist() if any([clock.tick(t * time_base) for clock in clocks])]


@dataclass(frozen=True)
class ClipSamples:
    """The samples of one clip, as in ClipAnalysis."""

    motion_score: float
    flow: np.ndarray
    camera: CameraMotion
    frames: np.ndarray
    frame_seconds: tuple[float, float, float]


@dataclass
class DisplayGeometry:
    """The way from a coded image to the shown one: upright, with square pixels.

    display: width and height of the shown image.
    """

    orientation: Orientation = UPRIGHT
    display: tuple[int, int] = (0, 0)

    def upright(self, plane: np.ndarray) -> np.ndarray:
        """Turn a coded image upright."""
        return self.orientation.upright(plane)

    def upright_motion(self, velocity: np.ndarray) -> np.ndarray:
        """Convert (n, 4) motions dx, dy (in coded widths), growth, rotation to those seen in the shown image."""
        dx, dy = self.orientation.upright_motion(velocity[:, 0], velocity[:, 1])
        # The unit is the width of the upright image, which for a turned one is the height of the coded one.
        scale = self.display[1] / self.display[0] if self.orientation.sideways else 1.0
        clockwise = -velocity[:, 3] if self.orientation.mirrored else velocity[:, 3]
        return np.stack([dx * scale, dy * scale, velocity[:, 2], clockwise], 1)


@dataclass
class Sampler:
    """Collects the samples of one source: `add` takes every frame, `take` returns the samples of a finished clip."""

    config: MotionConfig
    geometry: DisplayGeometry
    showing: Showing
    kept: list[KeptFrame] = field(default_factory=list)
    pairs: list[FlowPair] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._flow: Flow
        self._flow, self._wants_rgb, self._size = flow_function(self.config)
        self._frame_clock = Clock(FRAMES_PER_SECOND)
        self._motion_clock = Clock(self.config.fps)
        self._last: tuple[int, float, np.ndarray] | None = None

    def add(self, frame: int, seconds: float, decoded: DecodedFrame) -> None:
        """Take the next frame and keep the samples that are due at its time."""
        far = not self.kept or abs(seconds - self.kept[-1].seconds) > KEY_SPACING
        if self._frame_clock.tick(seconds) or (decoded.key and far):
            self.kept.append(KeptFrame(frame, seconds, _frame_planes(decoded)))
        if self._motion_clock.tick(seconds):
            now = self._motion_image(decoded)
            if self._last is not None:
                self.pairs.append(self._pair(self._last, (frame, seconds, now)))
            self._last = frame, seconds, now

    def _motion_image(self, decoded: DecodedFrame) -> np.ndarray:
        """Return the upright image that flow is computed on, (h, w, 3) RGB or (h, w) luma."""
        size = self._size(*self.geometry.display)
        if self._wants_rgb:
            rgb = self.geometry.upright(to_rgb(decoded.full, self.showing))
            return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
        return self._luma(decoded.small[0])

    def _luma(self, luma: np.ndarray) -> np.ndarray:
        size = grid_size(*self.geometry.display, self.config.short_side)
        return cv2.resize(self.geometry.upright(luma), size, interpolation=cv2.INTER_AREA)

    def _pair(
        self, one: tuple[int, float, np.ndarray], other: tuple[int, float, np.ndarray], flow: Flow | None = None
    ) -> FlowPair:
        """Compute the flow between two samples (number, time, image) and fit the camera motion."""
        seconds = max(other[1] - one[1], 1e-3)
        field_ = (flow or self._flow)(one[2], other[2])
        # Samples are uneven unless the frame rate is a multiple of the sample rate: scale vectors to one sample step.
        even = field_ * np.float32(1 / self.config.fps / seconds)
        fit = fit_similarity(*points_for_fit(field_, one[2]), seconds)
        return FlowPair(one[0], other[0], seconds, stored_flow(even, self.config.stored_short_side), fit)

    def thin(self, before: int) -> None:
        """Bound the memory of a long shot: drop every second kept frame before the frame `before`."""
        if sum(plane.nbytes for k in self.kept for plane in k.planes) > MAX_KEPT:
            self.kept = [k for i, k in enumerate(self.kept) if i % 2 == 0 or k.frame >= before]

    def forget(self, frame: int) -> None:
        """Drop all samples before a frame."""
        self.kept = [k for k in self.kept if k.frame >= frame]
        self.pairs = [p for p in self.pairs if p.before >= frame]

    def take(self, span: ClipSpan, velocity: np.ndarray, rate: float) -> ClipSamples | None:
        """Return the samples of a clip; None when none of its frames was sampled.

        velocity: (n, 4) of `track_camera` on coded images, times `rate`, the frames per second.
        """
        kept = [k for k in self.kept if span.start_frame <= k.frame < span.end_frame]
        if not kept:
            return None
        pairs = [p for p in self.pairs if span.start_frame <= p.before and p.after < span.end_frame]
        if not pairs and len(kept) > 1:
            pairs = [self._kept_pair(kept)]
        middle = (kept[0].seconds + kept[-1].seconds) / 2
        chosen = [kept[0], min(kept, key=lambda k: abs(k.seconds - middle)), kept[-1]]
        size = grid_size(*self.geometry.display, self.config.stored_short_side)
        flows = np.stack([p.flow for p in pairs]) if pairs else np.zeros((0, size[1], size[0], 2), np.float16)
        return ClipSamples(
            motion_score=motion_score(flows),
            flow=flows,
            camera=classify(self.geometry.upright_motion(velocity), rate, [p.fit for p in pairs]),
            frames=np.stack([self._rgb(k.planes) for k in chosen]),
            frame_seconds=(chosen[0].seconds, chosen[1].seconds, chosen[2].seconds),
        )

    def _kept_pair(self, kept: list[KeptFrame]) -> FlowPair:
        """Compute the flow of a clip that is too short to hold two samples of the motion rate."""
        one, other = kept[0], kept[-1]
        images = [self._luma(k.planes[0]) for k in (one, other)]
        return self._pair((one.frame, one.seconds, images[0]), (other.frame, other.seconds, images[1]), flow=farneback)

    def _rgb(self, planes: Planes) -> np.ndarray:
        """Convert kept planes to an upright RGB image (H, W, 3), at most FRAME_WIDTH wide."""
        # Scale first: converting to RGB costs more than scaling.
        rgb = self.geometry.upright(to_rgb(_scaled(planes), self.showing))
        width, height = self.geometry.display
        scale = min(1.0, FRAME_WIDTH / width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return rgb if rgb.shape[1::-1] == size else cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)


def points_for_fit(flow: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thin flow to about 24 × 14 points and weight them by gradients of the image: flat areas show no motion."""
    grey = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    dx, dy = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    energy = cv2.boxFilter(dx * dx + dy * dy, -1, (5, 5))
    height, width = grey.shape
    longest = max(width, height)
    size = max(8, min(width, 24 * width // longest)), max(8, min(height, 24 * height // longest))
    scale = np.array([size[0] / width, size[1] / height], np.float32)
    points = cv2.resize(flow, size, interpolation=cv2.INTER_AREA) * scale
    trust = cv2.resize(energy, size, interpolation=cv2.INTER_AREA)
    return points, trust / (trust + 400.0)


def _frame_planes(decoded: DecodedFrame) -> Planes:
    """Return planes at most KEPT_WIDTH wide, copied because the decoder reuses its memory."""
    luma, blue, red = decoded.full
    if luma.shape[1] <= KEPT_WIDTH:
        return luma.copy(), blue.copy(), red.copy()
    while luma.shape[1] > KEPT_WIDTH:
        luma, blue, red = halve(luma), halve(blue), halve(red)
    return luma, blue, red


def _scaled(planes: Planes) -> Planes:
    """Scale planes to at most FRAME_WIDTH wide, luma by area so that text stays sharp."""
    luma, blue, red = planes
    if luma.shape[1] <= FRAME_WIDTH:
        return planes
    height = max(2, round(luma.shape[0] * FRAME_WIDTH / luma.shape[1] / 2) * 2)
    chroma = (FRAME_WIDTH // 2, height // 2)
    return (
        cv2.resize(luma, (FRAME_WIDTH, height), interpolation=cv2.INTER_AREA),
        cv2.resize(blue, chroma, interpolation=cv2.INTER_LINEAR),
        cv2.resize(red, chroma, interpolation=cv2.INTER_LINEAR),
    )
