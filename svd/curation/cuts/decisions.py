"""Deciding the proposals of the cut cascade on the tiny images around them.

A flash, a strobe or motion is no cut. A dissolve or a fade gets its interval. A low-contrast hard cut that only a slow
pass noticed gets its exact frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svd.curation.base.types import CutKind
from svd.curation.cuts.frame_scores import Features
from svd.curation.cuts.transitions import (
    MIN_UNEXPLAINED,
    SAME_SCENE_SLOWLY,
    Ramp,
    are_blank,
    fade_start,
    fit_ramp,
    same_scene,
    unexplained,
)

FLASH_SECONDS = 0.4  # a longer interruption of a shot is no flash
MAX_FADE_SECONDS = 3.0
MAX_DISSOLVE_SECONDS = 2.5
PADS = (0.15, 0.4, 0.8, 1.5)  # seconds around a pair of a slow pass in which the ends of its transition are searched
MIN_PROMINENCE = 2.0  # a jump must exceed the median of its neighbours by this factor


@dataclass(frozen=True)
class Found:
    """A cut by frame numbers: [start, end) is the transition, empty for a hard cut; `end` begins the new shot."""

    kind: CutKind
    start: int
    end: int
    detector: str
    score: float
    threshold: float


@dataclass(frozen=True)
class Proposal:
    """The suspicion of a pass that a shot ends after frame `before` and at the latest at `after`."""

    before: int
    after: int
    detector: str
    score: float
    threshold: float


class CutDecider:
    """Decides the proposals over one stretch of features; `found` holds the cuts.

    All frame numbers are places in the lists of features.
    """

    def __init__(self, features: Features) -> None:
        self.numbers = np.array(features.numbers)
        self.seconds = np.array(features.seconds)
        self.images = np.stack(features.tiny_images)
        self.size = features.tiny_size
        self.pixels = self.size[0] * self.size[1]
        self._exchanges: dict[tuple[int, int], float] = {}
        self.found: list[Found] = []
        self.rejected: list[tuple[int, int]] = []
        self._taken_out = np.zeros(len(self.images), bool)
        span = self.seconds[-1] - self.seconds[0]
        self.rate = (len(self.seconds) - 1) / span if span > 0 else 25.0

    def _keep(self, kind: CutKind, start: int, end: int, cause: Proposal) -> None:
        """Add a cut with the evidence of its proposal."""
        self.found.append(Found(kind, start, end, cause.detector, float(cause.score), cause.threshold))

    def blanks(self) -> None:
        """Find black or white stretches, with the fades that lead into and out of them."""
        blank = are_blank(self.images[:, : self.pixels])
        edges = np.flatnonzero(np.diff(np.concatenate([[0], blank.view(np.int8), [0]])))
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            self._blank(int(first), int(last))

    def _blank(self, first: int, last: int) -> None:
        """Decide the blank stretch [first, last): a fade, a black gap, or a flash."""
        reach, count = round(MAX_FADE_SECONDS * self.rate), len(self.images)
        before, after = max(0, first - reach), min(count, last + reach)
        start = before + fade_start(self.images[before : first + 1], self.pixels) if first else 0
        end = after - fade_start(self.images[last - 1 : after][::-1], self.pixels) if last < count else count
        start, end = min(start, first), max(end, last)
        if start and end < count and self._is_flash(start - 1, end):
            self._reject(start - 1, end)
            return
        level = float(self.images[first:last, : self.pixels].mean())
        kind: CutKind = "fade" if start < first or end > last else "black"
        self._keep(kind, start, end, Proposal(first, last, "blank", level, 40.0))

    def _same(self, one: int, other: int) -> bool:
        return same_scene(self.images[one], self.images[other], self.pixels)

    def _reject(self, before: int, after: int) -> None:
        """Replace the images of a flash, between two frames of one shot, by mixes of these frames.

        Otherwise the flash would make the motion around it look like a transition.
        """
        self.rejected.append((before, after))
        self._taken_out[before + 1 : after] = True
        weight = (np.arange(1, after - before) / (after - before))[:, None]
        one, other = self.images[before].astype(np.float32), self.images[after].astype(np.float32)
        self.images[before + 1 : after] = np.rint(one * (1 - weight) + other * weight)

    def _explained(self, before: int, after: int) -> bool:
        """Say whether a cut or a flash that is already known explains a proposal."""
        inside = any(c.start - 1 <= after and before <= c.end for c in self.found)
        return inside or any(low <= before and after <= high for low, high in self.rejected)

    def jumps(self, proposals: list[Proposal], scores: dict[int, float]) -> None:
        """Decide proposals between neighbouring frames: hard cuts, unless they are flashes, strobes or plain motion.

        scores: content score by the place of the second of two neighbours.
        """
        best: dict[int, Proposal] = {}
        for p in proposals:
            if p.after not in best:
                best[p.after] = p
        groups: list[list[Proposal]] = []
        gap = max(2, round(0.1 * self.rate))
        for after in sorted(best):
            if groups and after - groups[-1][-1].after <= gap:
                groups[-1].append(best[after])
            else:
                groups.append([best[after]])
        groups = [g for g in groups if not self._explained(g[0].before, g[-1].after)]
        for group in self._without_flashes(groups):
            self._group(group, scores)

    def _without_flashes(self, groups: list[list[Proposal]]) -> list[list[Proposal]]:
        """Reject the groups, or pairs of groups, that are flashes; return the others."""
        kept: list[list[Proposal]] = []
        skip = False
        for i, group in enumerate(groups):
            if skip:
                skip = False
                continue
            first, last = group[0].before, group[-1].after
            if len(group) > 1 and self._same(first, last):
                self._reject(first, last)
                continue
            following = groups[i + 1] if i + 1 < len(groups) else None
            if following is not None and self._is_flash(first, following[-1].after):
                self._reject(first, following[-1].after)
                skip = True
                continue
            kept.append(group)
        return kept

    def _is_flash(self, before: int, after: int) -> bool:
        """Say whether the same shot is on both sides of a short interruption."""
        one, other = self.images[before], self.images[after]
        soon = self.seconds[after] - self.seconds[before] <= FLASH_SECONDS
        return bool(soon) and same_scene(one, other, self.pixels, SAME_SCENE_SLOWLY)

    def _group(self, group: list[Proposal], scores: dict[int, float]) -> None:
        """Decide proposals that lie close together: one hard cut, a short transition, two hard cuts, or nothing."""
        peak = max(group, key=lambda p: scores.get(p.after, p.score))
        first, last = group[0].before, group[-1].after
        others = [scores.get(p.after, p.score) for p in group if p is not peak]
        if not others or scores.get(peak.after, peak.score) >= 1.5 * max(others):
            if self.prominent(peak, scores) and not self._same(peak.before, peak.after):
                self._keep("hard", peak.after, peak.after, peak)
            return
        ramp = self._ramp(max(0, first - 2), min(len(self.images) - 1, last + 2))
        if ramp is not None and ramp.is_transition and self._is_exchange(ramp):
            self._keep("dissolve" if ramp.end > ramp.start else "hard", ramp.start, ramp.end, peak)
        elif len(group) == 2 and all(self.prominent(p, scores) for p in group):
            for p in group:
                self._keep("hard", p.after, p.after, p)

    def prominent(self, p: Proposal, scores: dict[int, float], factor: float = MIN_PROMINENCE) -> bool:
        """Say whether a jump exceeds what happens around it by this factor."""
        near = [scores[f] for f in range(p.after - 3, p.after + 4) if f != p.after and f in scores]
        # The median, because a second cut or a flash nearby would raise the mean.
        return not near or scores.get(p.after, p.score) >= factor * float(np.median(near))

    def _ramp(self, low: int, high: int) -> Ramp | None:
        """Fit a transition to the images low…high."""
        ramp = fit_ramp(self.images[low : high + 1], self.pixels, self.numbers[low : high + 1])
        if ramp is None:
            return None
        return Ramp(ramp.start + low, ramp.end + low, ramp.error, ramp.off_line, ramp.distance, ramp.similarity)

    def pairs(self, proposals: list[Proposal]) -> None:
        """Decide proposals of slower passes: dissolves, fades and low-contrast hard cuts; the rest is motion."""
        for p in sorted(proposals, key=lambda p: -p.score):
            before, after = p.before, p.after
            if self._explained(before, after):
                continue
            ramp = self._best_ramp(before, after)
            if ramp is not None and not self._explained(ramp.start - 1, ramp.end):
                self._keep("dissolve" if ramp.end > ramp.start else "hard", ramp.start, ramp.end, p)

    def _best_ramp(self, before: int, after: int) -> Ramp | None:
        """Find the best transition around a pair of frames, no farther than the neighbouring cuts."""
        low = max([c.end for c in self.found if c.end <= before], default=0)
        high = min([c.start - 1 for c in self.found if c.start > after], default=len(self.images) - 1)
        fits = []
        for pad in PADS:
            ends = self.seconds[before] - pad, self.seconds[after] + pad
            first, last = (int(i) for i in np.searchsorted(self.seconds, ends))
            first, last = max(low, first), min(high, last)
            ramp = self._ramp(first, last)
            if ramp is not None and ramp.is_transition:
                # A ramp up to the ends of its window is probably part of a longer one.
                partial = (ramp.start <= first + 2 and first > low) or (ramp.end >= last - 1 and last < high)
                fits.append((ramp.error + 0.5 * ramp.off_line + (0.3 if partial else 0.0), ramp))
        best = min(fits, key=lambda f: f[0])[1] if fits else None
        return best if best is None or self._is_exchange(best) else None

    def _is_exchange(self, ramp: Ramp) -> bool:
        """Say whether the image is exchanged along a ramp, not moved."""
        if ramp.end - ramp.start < 2:
            return True
        key = ramp.start, ramp.end
        if key not in self._exchanges:
            frames = slice(max(ramp.start - 1, 0), ramp.end + 1)
            # The images that replace a flash are mixes, which no motion would explain.
            luma = self.images[frames][~self._taken_out[frames], : self.pixels]
            self._exchanges[key] = unexplained(luma.reshape(-1, *self.size)) if len(luma) > 1 else 0.0
        seconds = self.seconds[min(ramp.end, len(self.seconds) - 1)] - self.seconds[ramp.start]
        # Slow motion is too fine for the tiny images, so a long ramp has to be clearer.
        clearer = 0.4 * min(max((seconds - 0.7) / 0.8, 0.0), 1.0)
        return (
            seconds <= MAX_DISSOLVE_SECONDS and self._exchanges[key] - 0.5 * ramp.off_line > MIN_UNEXPLAINED + clearer
        )
