"""Scores of each frame for cut detection: content scores at several frame rates, and tiny images.

The content score is PySceneDetect's: the mean absolute difference of hue, saturation and value between two frames, with
weights 1, 1, 1. All passes of the cascade share one HSV image per frame, so each further frame rate costs one L1 norm.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
from scenedetect import FrameTimecode, StatsManager
from scenedetect.detector import SceneDetector
from scenedetect.detectors import HashDetector, HistogramDetector, ThresholdDetector

from svd.config import CutPass
from svd.curation.decoding.decoder import Planes, halve

TINY_WIDTH = 48
TRANSNET_SIZE = (48, 27)  # width, height
Look = tuple[int, float, Planes]  # number and time of a frame, and its small planes


@dataclass(frozen=True)
class Jump:
    """One comparison of a pass: the frames before and after, and its score."""

    before: int
    after: int
    score: float


@dataclass(frozen=True)
class Hit:
    """A cut that a PySceneDetect detector reports."""

    frame: int
    score: float


def to_hsv(small: Planes) -> np.ndarray:
    """Convert Y (h, w), U and V (h/2, w/2) to OpenCV's 8-bit HSV (h, w, 3)."""
    return cv2.cvtColor(to_bgr(small), cv2.COLOR_BGR2HSV)


def to_bgr(small: Planes) -> np.ndarray:
    """Convert Y (h, w), U and V (h/2, w/2) to BGR (h, w, 3) as limited BT.601: scores don't need the exact matrix."""
    width = small[0].shape[1]
    packed = np.concatenate([plane.reshape(-1) for plane in small]).reshape(-1, width)
    return cv2.cvtColor(packed, cv2.COLOR_YUV2BGR_I420)


def content_score(one: np.ndarray, other: np.ndarray) -> float:
    """Return PySceneDetect's ContentDetector score of two HSV images (h, w, 3), 0…255."""
    return cv2.norm(one, other, cv2.NORM_L1) / one.size


def tiny_image(small: Planes) -> np.ndarray:
    """Halve Y, U and V until Y is at most TINY_WIDTH wide; return them as one uint8 vector, Y first."""
    luma, blue, red = small
    while luma.shape[1] > TINY_WIDTH and luma.shape[0] >= 16:
        luma, blue, red = halve(luma), halve(blue), halve(red)
    return np.concatenate([luma.reshape(-1), blue.reshape(-1), red.reshape(-1)])


def tiny_size(small: Planes) -> tuple[int, int]:
    """Return height and width of the Y part of `tiny_image`."""
    height, width = small[0].shape
    while width > TINY_WIDTH and height >= 16:
        height, width = height // 2, width // 2
    return height, width


class Clock:
    """Picks the frames of a slower frame rate by their times: the first frame in each interval of 1 / fps.

    fps: None picks every frame.
    """

    def __init__(self, fps: float | None) -> None:
        self.fps = fps
        self._next = -math.inf

    def tick(self, seconds: float) -> bool:
        """Say whether the frame at `seconds` belongs to the slower rate; call it once per frame."""
        if self.fps is None:
            return True
        # A thousandth of a step absorbs the rounding of timestamps to milliseconds.
        if seconds < self._next - 1e-3 / self.fps:
            return False
        self._next = (math.floor(seconds * self.fps + 1e-3) + 1) / self.fps
        return True


class _ContentPass:
    """The content detector at one frame rate; `jumps` are its comparisons."""

    def __init__(self, fps: float | None) -> None:
        self.clock = Clock(fps)
        self.jumps: list[Jump] = []
        self._last: tuple[int, np.ndarray] | None = None

    def wants(self, seconds: float) -> bool:
        return self.clock.tick(seconds)

    def add(self, frame: int, hsv: np.ndarray, change: float) -> None:
        """Compare with the last frame; change: the score against the last frame that any pass has seen."""
        if self._last is not None:
            score = change if self.clock.fps is None else content_score(hsv, self._last[1])
            self.jumps.append(Jump(self._last[0], frame, score))
        self._last = frame, hsv

    def replace(self, steps: list[Jump]) -> None:
        """Replace the comparison of two frames by the steps between them."""
        place = bisect.bisect_left(self.jumps, steps[-1].after, key=lambda j: j.after)
        self.jumps[place : place + 1] = steps


def _library_detector(cut_pass: CutPass, min_seconds: float) -> SceneDetector:
    """Make the detector of PySceneDetect that a pass names."""
    if cut_pass.detector == "hash":
        return HashDetector(threshold=cut_pass.threshold, min_scene_len=min_seconds)
    if cut_pass.detector == "histogram":
        return HistogramDetector(threshold=cut_pass.threshold, min_scene_len=min_seconds)
    return ThresholdDetector(threshold=cut_pass.threshold, min_scene_len=min_seconds)


class _LibraryPass:
    """One of PySceneDetect's other detectors, fed with the small images of its frame rate."""

    def __init__(self, cut_pass: CutPass, min_seconds: float, fps: float) -> None:
        self.clock = Clock(cut_pass.fps)
        self.hits: list[Hit] = []
        self._detector = _library_detector(cut_pass, min_seconds)
        self._detector.stats_manager = StatsManager()
        self._rate = min(fps, cut_pass.fps or fps)
        self._frames: list[int] = []

    def wants(self, seconds: float) -> bool:
        return self.clock.tick(seconds)

    def add(self, frame: int, bgr: np.ndarray) -> None:
        timecode = FrameTimecode(len(self._frames), fps=self._rate)
        self._frames.append(frame)
        for cut in self._detector.process_frame(timecode, bgr):
            self.hits.append(Hit(self._frames[cut.frame_num], self._score(cut)))

    def _score(self, cut: FrameTimecode) -> float:
        """Return the score of the detector at a cut; NaN if it keeps none."""
        key = self._detector.get_metrics()[0]
        manager = self._detector.stats_manager
        found = manager.get_metrics(cut, [key])[0] if manager and manager.metrics_exist(cut, [key]) else None
        if found is None:
            return math.nan
        # The histogram detector keeps the similarity and compares its complement.
        return 1.0 - float(found) if isinstance(self._detector, HistogramDetector) else float(found)


@dataclass
class Features:
    """Features of the scored frames, in lists of equal length; numbers: their frame numbers."""

    numbers: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tiny_images: list[np.ndarray] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)  # content score against the scored frame before
    transnet_images: list[np.ndarray] = field(default_factory=list)  # RGB of TRANSNET_SIZE; empty without that detector
    tiny_size: tuple[int, int] = (0, 0)

    def forget(self, frame: int) -> None:
        """Drop everything before `frame`."""
        count = bisect.bisect_left(self.numbers, frame)
        for values in (self.numbers, self.seconds, self.tiny_images, self.changes, self.transnet_images):
            del values[:count]


class FrameScorer:
    """Scores frames for all passes of the cascade; call `add` once per frame, in display order."""

    def __init__(self, passes: list[CutPass], min_seconds: float, fps: float) -> None:
        self.features = Features()
        self.content = {c.fps: _ContentPass(c.fps) for c in passes if c.detector in ("content", "adaptive")}
        self.library = {
            i: _LibraryPass(c, min_seconds, fps)
            for i, c in enumerate(passes)
            if c.detector in ("hash", "histogram", "threshold")
        }
        self._tiny = any(c.detector == "transnetv2" for c in passes)
        self._last: np.ndarray | None = None
        self._ready: tuple[Planes, np.ndarray, np.ndarray] | None = None
        self._change: tuple[Planes, np.ndarray, float] | None = None

    def change(self, small: Planes) -> float:
        """Return the content score of an image against the last one that was added; 0 for the first."""
        if self._last is None:
            return 0.0
        # Cached, because it is needed twice for most frames: before and while they are added.
        if self._change is None or self._change[0] is not small or self._change[1] is not self._last:
            self._change = small, self._last, content_score(self._colours(small)[1], self._last)
        return self._change[2]

    def _colours(self, small: Planes) -> tuple[np.ndarray, np.ndarray]:
        """Return BGR and HSV of an image; cached for the call of `add` that follows `change`."""
        if self._ready is None or self._ready[0] is not small:
            bgr = to_bgr(small)
            self._ready = small, bgr, cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
        return self._ready[1:]

    def add(self, frame: int, seconds: float, small: Planes) -> None:
        """Score a frame with its number and time; small: Y (h, w), U and V (h/2, w/2) uint8."""
        features, change = self.features, self.change(small)
        features.numbers.append(frame)
        features.seconds.append(seconds)
        features.tiny_images.append(tiny_image(small))
        features.changes.append(change)
        if not features.tiny_size[0]:
            features.tiny_size = tiny_size(small)
        content = [p for p in self.content.values() if p.wants(seconds)]
        library = [p for p in self.library.values() if p.wants(seconds)]
        bgr, self._last = self._colours(small)
        if self._tiny:
            features.transnet_images.append(cv2.resize(bgr, TRANSNET_SIZE, interpolation=cv2.INTER_AREA)[:, :, ::-1])
        for other in library:
            other.add(frame, bgr)
        for own in content:
            own.add(frame, self._last, change)

    def insert(self, looks: list[Look]) -> None:
        """Insert the frames between two scored neighbours; looks: all frames from the first to the second.

        Only the content pass at the source's rate takes them; slower passes keep their comparisons.
        """
        colours = [to_hsv(small) for _, _, small in looks]
        changes = [content_score(other, one) for one, other in itertools.pairwise(colours)]
        features = self.features
        place = bisect.bisect_left(features.numbers, looks[-1][0])
        features.changes[place] = changes[-1]
        features.changes[place:place] = changes[:-1]
        features.numbers[place:place] = [number for number, _, _ in looks[1:-1]]
        features.seconds[place:place] = [seconds for _, seconds, _ in looks[1:-1]]
        features.tiny_images[place:place] = [tiny_image(small) for _, _, small in looks[1:-1]]
        if None in self.content:
            pairs = itertools.pairwise(number for number, _, _ in looks)
            self.content[None].replace([Jump(*pair, change) for pair, change in zip(pairs, changes, strict=True)])

    def forget(self, frame: int) -> None:
        """Drop the features and jumps before `frame`."""
        self.features.forget(frame)
        for own in self.content.values():
            own.jumps = [j for j in own.jumps if j.after >= frame]

    def jumps(self, fps: float | None) -> Iterator[Jump]:
        """Yield the remembered comparisons at a frame rate."""
        yield from self.content[fps].jumps
