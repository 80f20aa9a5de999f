"""The cut cascade (§3.1, App. C): passes at several frame rates and thresholds over one decode.

Passes propose cuts: at the source's rate a jump of the content score, at slower rates a pair of frames that is too
different for one shot. `decisions.CutDecider` decides each proposal on the tiny images around it.

Not every frame is scored, and some are not even decoded. Where two scored frames differ, the frames between are scored
as well. Where a cut was found, or may hide, between frames that were not decoded, these are decoded after all.
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

SETTLE_SECONDS = 4.0  # a transition is decided when this much video after it is known
MIN_CONTENT = 15.0  # PySceneDetect's min_content_val of its adaptive detector
ADAPTIVE_WINDOW = 2  # neighbours on each side, as in PySceneDetect
SCORED_FPS = 12.0  # frames per second that are scored where nothing happens
LOOK_AGAIN = 0.12  # share of the threshold from which the frames between two scored ones are scored too
DEFAULT_THRESHOLD = 27.0  # PySceneDetect's threshold of content; used when no pass compares every frame
SUSPECT = 1.2  # prominence from which a jump over frames that were not decoded is worth a second look
Step = tuple[int, int]  # numbers of two frames


def adaptive_ratios(scores: np.ndarray, window: int = ADAPTIVE_WINDOW) -> np.ndarray:
    """Return PySceneDetect's ratio of each score to the mean of `window` neighbours per side; 0 at the ends."""
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
    """Return the name of a pass in the evidence of a cut, such as "content@8"."""
    return f"{cut_pass.detector}@{cut_pass.fps:g}" if cut_pass.fps else cut_pass.detector


def scored_stride(config: CutsConfig, fps: float) -> int:
    """Return how many frames apart the cascade scores frames where nothing happens; 1: it needs every frame.

    The content score is a distance, so a cut shows between frames further apart as well. The other detectors at the
    source's rate, TransNetV2 among them, need every frame.
    """
    simple = all(c.detector == "content" for c in config.passes if c.fps is None or c.fps > SCORED_FPS)
    return max(1, int(fps / SCORED_FPS + 0.05)) if simple else 1


class CutFinder:
    """Finds the cuts of a source while it is decoded.

    `add` takes the decoded frames in display order. `settle` returns the cuts that nothing later can change, each once
    and in order. It also drops what is no longer needed, so that memory is bounded by the time between two calls.

    look_again: decodes skipped frames; given pairs of frame numbers, it yields per pair all frames from the first to
    the second. None: every frame is added.
    edges: frames at which a source is split into parts; on which side a cut starts must not depend on what was skipped.
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
        self._next = 0  # number of the next frame
        self._settled = 0
        self._moved = 0  # camera motion is known up to this frame
        self._fps = max(fps, 1.0)
        self._stride = scored_stride(config, fps)
        every_frame = [c.threshold for c in config.passes if c.fps is None or c.fps > SCORED_FPS]
        self._threshold = min(every_frame, default=DEFAULT_THRESHOLD)
        self._waiting: list[tuple[int, float, DecodedFrame]] = []  # decoded, but not scored so far

    def add(self, number: int, seconds: float, frame: DecodedFrame) -> bool:
        """Take the next decoded frame; return whether a cut may hide among skipped frames before it."""
        numbers = self.scorer.features.numbers
        self._next = number + 1
        if numbers and number - numbers[-1] < self._stride:
            self._waiting.append((number, seconds, frame))
            return False
        change = self.scorer.change(frame.small)
        if change >= LOOK_AGAIN * self._threshold:
            self._score_waiting()
        self._waiting.clear()
        hidden = bool(numbers) and number - numbers[-1] > 1 and change >= self._threshold
        self.scorer.add(number, seconds, frame.small)
        return hidden

    def _score_waiting(self) -> None:
        for number, seconds, frame in self._waiting:
            self.scorer.add(number, seconds, frame.small)
        self._waiting.clear()

    def settle(self, final: bool = False) -> tuple[list[Found], np.ndarray]:
        """Return the new cuts that are certain by now, all that remain if `final`, and the camera motion up to there.

        The motion is (n, 4) as from `track_camera`, between neighbouring frames since the last call.
        """
        if final:
            self._score_waiting()
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
        """Return the frame before which all cuts are known."""
        return self._settled

    def _motion(self, limit: int) -> np.ndarray:
        """Return the camera motion per frame up to `limit`; over frames that were not scored it is spread evenly."""
        features = self.scorer.features
        first = bisect.bisect_left(features.numbers, self._moved)
        last = bisect.bisect_right(features.numbers, limit)
        height, width = features.tiny_size
        images = np.stack(features.tiny_images[first:last])[:, : height * width].reshape(-1, height, width)
        steps = np.diff(features.numbers[first:last])
        self._moved = features.numbers[last - 1]
        return np.repeat(track_camera(images) / np.maximum(steps, 1)[:, None], steps, axis=0)

    def _examine(self, limit: int) -> list[Found]:
        """Return the cuts of the remembered stretch, after decoding the skipped frames before `limit` that matter."""
        seen: set[Step] = set()
        while True:
            found, steps = self._decide()
            steps = sorted({s for s in steps if self._settled <= s[1] <= limit} - seen)
            if not steps or self._look_again is None:
                return found
            seen.update(steps)
            for looks in self._look_again(steps):
                self.scorer.insert(looks)

    def _decide(self) -> tuple[list[Found], list[Step]]:
        """Return the cuts of the remembered stretch, and the steps between scored frames that hide where a cut is.

        The decider counts scored frames; here its places become frame numbers.
        """
        numbers = self.scorer.features.numbers
        if len(numbers) < 2:
            return [], []
        scores = self._neighbour_scores()
        decider = CutDecider(self.scorer.features)
        proposals = [p for cut_pass in self.config.passes for p in self._proposals(cut_pass)]
        neighbours = [p for p in proposals if p.after - p.before == 1]
        decider.blanks()
        decider.jumps(neighbours, scores)
        decider.pairs([p for p in proposals if p.after - p.before > 1])
        found, places = [], {p.after for p in neighbours if decider.prominent(p, scores, SUSPECT)}
        certain = set[int]()
        for cut in sorted(decider.found, key=lambda c: c.end):
            # The ends of a fade can't be known better than to a frame or two; a seeming dissolve may be motion.
            places.update(() if cut.kind == "fade" else range(cut.start, cut.end + 1))
            certain.update(self._start_at_edge(cut))
            end = numbers[cut.end] if cut.end < len(numbers) else self._next
            start = end if cut.kind == "hard" else numbers[cut.start - 1] + 1 if cut.start else numbers[0]
            found.append(replace(cut, start=min(start, end), end=end))
        inner = sorted(p for p in places | certain if 0 < p < len(numbers) and (p in certain or self._differs(p)))
        return found, [(numbers[p - 1], numbers[p]) for p in inner if numbers[p] - numbers[p - 1] > 1]

    def _start_at_edge(self, cut: Found) -> range:
        """Return the places around the start of a cut if it is so near an edge that it may be on either side."""
        numbers, near = self.scorer.features.numbers, 2 * self._stride
        start = numbers[min(cut.start, len(numbers) - 1)]
        around = range(cut.start - 1, cut.start + 2)
        return around if any(abs(start - edge) <= near for edge in self._edges) else range(0)

    def _differs(self, place: int) -> bool:
        """Say whether the frames before this one that were not scored may matter."""
        features = self.scorer.features
        apart = features.numbers[place] - features.numbers[place - 1] > 1
        return apart and features.changes[place] >= LOOK_AGAIN * self._threshold

    def _neighbour_scores(self) -> dict[int, float]:
        """Return the content scores of scored neighbours, per frame of distance, by the place of the second."""
        place = {number: i for i, number in enumerate(self.scorer.features.numbers)}
        return {
            place[j.after]: j.score / (j.after - j.before)
            for p in self.scorer.content.values()
            for j in p.jumps
            if j.before in place and place[j.after] - place[j.before] == 1
        }

    def _proposals(self, cut_pass: CutPass) -> list[Proposal]:
        """Return what one pass proposes."""
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
    """Return the jumps that exceed their neighbours, with their ratios as scores."""
    ratios = adaptive_ratios(np.array([j.score for j in jumps]))
    chosen = [i for i, j in enumerate(jumps) if ratios[i] >= threshold and j.score >= MIN_CONTENT]
    return [Jump(jumps[i].before, jumps[i].after, float(ratios[i])) for i in chosen]
