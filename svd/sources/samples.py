"""Which members of a WebDataset tar belong together.

The convention: those whose names agree up to the first dot of the base name. It fails for names with dots in them:
`show S01.E01.mp4` and `show S01.E02.mp4` would share their texts. So where several videos have one key, a text belongs
to the video with the longest name that it begins with, as `show S01.E01.en.txt` begins with `show S01.E01`.

A name that occurs twice, as in tars that were joined, tells samples apart as it does for WebDataset: members of a
sample follow each other. Where that leaves a doubt, texts belong to no video.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Member:
    """A file in a tar: its place among the members, its name, and whether it is a video or a text about one."""

    place: int
    name: str
    video: bool
    text: bool

    @property
    def key(self) -> str:
        """Return the folder and the base name up to its first dot."""
        folder, _, base = self.name.rpartition("/")
        return f"{folder}/{base.partition('.')[0]}"

    @property
    def stem(self) -> str:
        """Return the name up to its last dot."""
        return self.name.rpartition(".")[0]


def samples_of(members: Sequence[Member]) -> tuple[Mapping[int, tuple[int, ...]], list[str]]:
    """Map the place of each video to the places of its texts.

    Return also the names of texts that have the key of a video and belong to none.
    """
    found: dict[int, list[int]] = {one.place: [] for one in members if one.video}
    keys = {one.key for one in members if one.video}
    lost: list[str] = []
    for sample in _samples(members):
        videos = [one for one in sample if one.video]
        several = len({one.stem for one in videos}) > 1
        for text in (one for one in sample if one.text):
            owners = _longest(videos, text) if several else videos
            lost += [text.name] * (text.key in keys and not owners)
            for video in owners:
                found[video.place].append(text.place)
    return {place: tuple(texts) for place, texts in found.items()}, lost


def _samples(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Yield the members of each sample: all of one key, or each run of them where a name repeats."""
    by_key: dict[str, list[Member]] = {}
    for one in members:
        by_key.setdefault(one.key, []).append(one)
    run_of: dict[int, int] = {}
    for number, (_, run) in enumerate(groupby(members, key=lambda one: one.key)):
        run_of |= dict.fromkeys((one.place for one in run), number)
    for group in by_key.values():
        if len({one.name for one in group}) == len(group):
            yield group
        else:
            for _, run in groupby(group, key=lambda one: run_of[one.place]):
                yield from _without_repeats(list(run))


def _without_repeats(run: list[Member]) -> list[list[Member]]:
    """Split a run of members before each name that it has had.

    Only when all samples have the same names is it certain that the split is right; otherwise each member is alone.
    """
    samples: list[list[Member]] = [[]]
    for one in run:
        if any(one.name == other.name for other in samples[-1]):
            samples.append([])
        samples[-1].append(one)
    alike = len({frozenset(one.name for one in sample) for sample in samples}) == 1
    return samples if alike else [[one] for one in run]


def _longest(videos: Sequence[Member], text: Member) -> list[Member]:
    """Return the videos with the longest name that the text's name begins with."""
    fitting = [video for video in videos if text.name.startswith(f"{video.stem}.")]
    return [video for video in fitting if len(video.stem) == max(len(one.stem) for one in fitting)]
