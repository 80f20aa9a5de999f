"""The cut cascade (§3.1, App. C): passes at several frame rates and thresholds over one decode, then a look at each
candidate.

Passes propose: at the source's rate a jump of the content score, at slower rates a pair of frames too different for
one shot. The tiny pictures around a proposal decide: a flash, a strobe or motion is no cut; a dissolve or a fade
gets its interval, which belongs to no clip; a low-contrast hard cut that only a slow pass noticed gets its exact
frame.

Not every frame is looked at, and some are not even decoded. Where two frames that were looked at differ, those between
are looked at as well; where a cut was found, or may hide, between frames that were not decoded, they are decoded.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from svd.config import CutPass, CutsConfig
from svd.curation.cuts.decisions import CutDecider, Found, Proposal
from svd.curation.cuts.frame_scores import FrameScorer, Jump, Look
from svd.curation.cuts.transnet import transnet_jumps
from svd.curation.decoding.decoder import DecodedFrame
from svd.curation.motion.camera_velocity import track_camera

SETTLE_SECONDS = 4.0  # a transition is decided when this much footage after it is known
MIN_CONTENT = 15.0  # PySceneDetect's min_content_val of its adaptive detector
ADAPTIVE_WINDOW = 2
LOOKED_AT_FPS = 12.0  # frames a second that are looked at where nothing happens
LOOK_AGAIN = 0.12  # share of the threshold from which the frames between are looked at, too
DEFAULT_THRESHOLD = 27.0  # PySceneDetect's for content; where no pass compares every frame
SUSPECT = 1.2  # the same, from which a jump over frames that were not decoded is worth a second look
Step = tuple[int, int]  # numbers of two frames


def adaptive_ratios(scores: np.ndarray, window: int = ADAPTIVE_WINDOW) -> np.ndarray:
    """PySceneDetect's adaptive ratio of each score to the mean of `window` neighbours on both sides; 0 near the
    ends.
    """
    ratios = np.zeros(len(scores))
    for i in range(window, len(scores) - window):
        around = np.delete(scores[i - window : i + window + 1], window)
        mean = float(around.sum()) / (2.0 * window)
        if abs(mean) >= 0.00001:
            ratios[i] = min(float(scores[i]) / mean, 255.0)
        elif scores[i] >= MIN_CONTENT:
            ratios[i] = 255.0
    return ratios


def detector_name(cut_pass: CutPass) -> str:
    """Name of a pass in the evidence, such as content@8."""
    return f"{cut_pass.detector}@{cut_pass.fps:g}" if cut_pass.fps else cut_pass.detector


def looked_at_stride(config: CutsConfig, fps: float) -> int:
    """How far apart the frames are that the cascade looks at where nothing happens; 1: it needs every frame.

    Where all passes at the source's rate compare frames by content, a cut shows between frames further apart as well:
    the score is a distance. The other detectors, TransNetV2 among them, count on every frame.
    """
    simple = all(c.detector == "content" for c in config.passes if c.fps is None or c.fps > LOOKED_AT_FPS)
    return max(1, int(fps / LOOKED_AT_FPS + 0.05)) if simple else 1


class CutFinder:
    """Finds the cuts of a source while it is decoded.

    `add` takes the decoded frames in display order; `settle` returns the cuts that nothing later can change, each once
    and in order, and forgets what is no longer needed, so that memory is bounded by the time between two calls.
    look_again: decodes frames that were left out: given pairs of frame numbers, it returns all frames from the first to
    the second of each, pair after pair.
    edges: frames on whose sides a source is split: which side a cut starts on must not depend on what was looked at.
    """

    def __init__(
        self,
        config: CutsConfig,
        fps: float,
        look_again: Callable[[list[Step]], Iterable[list[Look]]] | None = None,
        edges: tuple[int, ...] = (),
    ) -> None:
        self.config = config
        self._edges = edges
        self.scorer = FrameScorer(config.passes, config.min_scene_seconds, fps)
        self._look_again = look_again
        self._next = 0
        self._settled = 0
        self._moved = 0  # camera motion is known up to this frame
        self._fps = max(fps, 1.0)
        self._stride = looked_at_stride(config, fps)
        every_frame = [c.threshold for c in config.passes if c.fps is None or c.fps > LOOKED_AT_FPS]
        self._threshold = min(every_frame, default=DEFAULT_THRESHOLD)
        self._waiting: list[tuple[int, float, DecodedFrame]] = []

    def add(self, number: int, seconds: float, picture: DecodedFrame) -> bool:
        """Take the next decoded frame; whether a cut may hide among frames left out before it."""
        numbers = self.scorer.features.numbers
        self._next = number + 1
        if numbers and number - numbers[-1] < self._stride:
            self._waiting.append((number, seconds, picture))
            return False
        change = self.scorer.change(picture.small)
        if change >= LOOK_AGAIN * self._threshold:
            self._look_at_waiting()
        self._waiting.clear()
        hidden = bool(numbers) and number - numbers[-1] > 1 and change >= self._threshold
        self.scorer.add(number, seconds, picture.small)
        return hidden

    def _look_at_waiting(self) -> None:
        for number, seconds, picture in self._waiting:
            self.scorer.add(number, seconds, picture.small)
        self._waiting.clear()

    def settle(self, final: bool = False) -> tuple[list[Found], np.ndarray]:
        """New cuts that are certain by now; with `final`, all that remain. With them the camera motion between
        neighbouring frames, from where the last call ended to the last settled frame, (n, 4) as camera_velocity.track_camera.
        """
        if final:
            self._look_at_waiting()
        context = round(SETTLE_SECONDS * self._fps)
        limit = self._next if final else self._next - context
        if limit <= self._settled:
            return [], np.zeros((0, 4), np.float32)
        found = [c for c in self._examine(limit) if self._settled <= c.end < limit or (final and c.end >= limit)]
        motion = self._motion(limit)
        self._settled = limit
        self.scorer.forget(limit - context)
        return found, motion

    @property
    def settled(self) -> int:
        """All cuts before this frame are known."""
        return self._settled

    def _motion(self, limit: int) -> np.ndarray:
        features = self.scorer.features
        first = bisect.bisect_left(features.numbers, self._moved)
        last = bisect.bisect_right(features.numbers, limit)
        height, width = features.tiny_size
        pictures = np.stack(features.tiny_images[first:last])[:, : height * width].reshape(-1, height, width)
        steps = np.diff(features.numbers[first:last])
        self._moved = features.numbers[last - 1]
        # Motion over frames that were not looked at is spread evenly over them.
        return np.repeat(track_camera(pictures) / np.maximum(steps, 1)[:, None], steps, axis=0)

    def _examine(self, limit: int) -> list[Found]:
        """The cuts of the remembered stretch, after a second look at all steps before `limit` that need one."""
        seen: set[Step] = set()
        while True:
            found, steps = self._judge()
            steps = sorted({s for s in steps if self._settled <= s[1] <= limit} - seen)
            if not steps or self._look_again is None:
                return found
            seen.update(steps)
            for looks in self._look_again(steps):
                self.scorer.insert(looks)

    def _judge(self) -> tuple[list[Found], list[Step]]:
        """The cuts of the remembered stretch, and the steps between frames looked at that hide where a cut is.

        The judge counts the frames that were looked at; this converts.
        """
        numbers = self.scorer.features.numbers
        if len(numbers) < 2:
            return [], []
        scores = self._neighbour_scores()
        judge = CutDecider(self.scorer.features)
        proposals = [p for cut_pass in self.config.passes for p in self._proposals(cut_pass)]
        neighbours = [p for p in proposals if p.after - p.before == 1]
        judge.blanks()
        judge.jumps(neighbours, scores)
        judge.pairs([p for p in proposals if p.after - p.before > 1])
        found, places = [], {p.after for p in neighbours if judge.prominent(p, scores, SUSPECT)}
        certain = set[int]()
        for cut in sorted(judge.found, key=lambda c: c.end):
            # A fade's ends are known to a frame or two in any case; what looks like a dissolve may be motion.
            places.update(() if cut.kind == "fade" else range(cut.start, cut.end + 1))
            certain.update(self._start_at_edge(cut))
            end = numbers[cut.end] if cut.end < len(numbers) else self._next
            start = end if cut.kind == "hard" else numbers[cut.start - 1] + 1 if cut.start else numbers[0]
            found.append(replace(cut, start=min(start, end), end=end))
        inner = sorted(p for p in places | certain if 0 < p < len(numbers) and (p in certain or self._differs(p)))
        return found, [(numbers[p - 1], numbers[p]) for p in inner if numbers[p] - numbers[p - 1] > 1]

    def _start_at_edge(self, cut: Found) -> range:
        """Places around the start of a cut when it is so near an edge that it may be on either side."""
        numbers, near = self.scorer.features.numbers, 2 * self._stride
        start = numbers[min(cut.start, len(numbers) - 1)]
        around = range(cut.start - 1, cut.start + 2)
        return around if any(abs(start - edge) <= near for edge in self._edges) else range(0)

    def _differs(self, place: int) -> bool:
        """Whether frames that were not looked at before this one may matter."""
        features = self.scorer.features
        apart = features.numbers[place] - features.numbers[place - 1] > 1
        return apart and features.changes[place] >= LOOK_AGAIN * self._threshold

    def _neighbour_scores(self) -> dict[int, float]:
        """Content scores between neighbours, per frame between them, by the place of the second."""
        place = {number: i for i, number in enumerate(self.scorer.features.numbers)}
        return {
            place[j.after]: j.score / (j.after - j.before)
            for p in self.scorer.content.values()
            for j in p.jumps
            if j.before in place and place[j.after] - place[j.before] == 1
        }

    def _proposals(self, cut_pass: CutPass) -> list[Proposal]:
        name, threshold = detector_name(cut_pass), cut_pass.threshold
        if cut_pass.detector == "transnetv2":
            jumps = transnet_jumps(self.scorer.features.transnet_images, self.scorer.features.numbers, threshold)
        elif cut_pass.detector == "content":
            jumps = [j for j in self.scorer.jumps(cut_pass.fps) if j.score >= threshold]
        elif cut_pass.detector == "adaptive":
            jumps = _adaptive(list(self.scorer.jumps(cut_pass.fps)), threshold)
        else:
            hits = self.scorer.library[self.config.passes.index(cut_pass)].hits
            jumps = [Jump(h.frame - 1, h.frame, h.score) for h in hits]
        place = {number: i for i, number in enumerate(self.scorer.features.numbers)}
        return [Proposal(place[j.before], place[j.after], name, j.score, threshold) for j in jumps if j.before in place]


def _adaptive(jumps: list[Jump], threshold: float) -> list[Jump]:
    ratios = adaptive_ratios(np.array([j.score for j in jumps]))
    chosen = [i for i, j in enumerate(jumps) if ratios[i] >= threshold and j.score >= MIN_CONTENT]
    return [Jump(jumps[i].before, jumps[i].after, float(ratios[i])) for i in chosen]
