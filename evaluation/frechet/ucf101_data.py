"""UCF-101 for the evaluation: official lists, prompts with the class histogram, and real clips.

Layout of the folder, as unpacked from the archives of the data set: `<Class>/v_<Class>_gNN_cNN.avi` (also below
`UCF-101/`), and `ucfTrainTestlist/` with `classInd.txt`, `trainlist01.txt` and `testlist01.txt`. A fixture of the same
layout works too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from evaluation.frechet.protocol import OFFICIAL_CLIPS, EvalProtocol, ScoreError
from svd.core.errors import UserError
from svd.media.video import read_frames

OFFICIAL_COUNTS = {"TableTennisShot": 140, "PlayingPiano": 105}
_SUFFIXES = {".avi", ".mp4", ".mkv", ".webm"}


@dataclass(frozen=True)
class Item:
    """One clip to generate: its number in the list, its class, and its prompt."""

    number: int
    label: str
    prompt: str


@dataclass(frozen=True)
class Dataset:
    """Real clips in a fixed order: `clips` holds (class, file), sorted by class and name."""

    folder: Path
    clips: tuple[tuple[str, Path], ...]

    @property
    def histogram(self) -> dict[str, int]:
        """The number of real clips by class."""
        return dict(sorted(Counter(label for label, _ in self.clips).items()))


def read_dataset(folder: Path, *, official: bool = True) -> Dataset:
    """Find the clips of `folder`; by its official lists, training and test part together, when it has them.

    official: the folder is UCF-101 itself, so the number of clips and two known class counts are checked.
    Raises UserError for missing folders, files and wrong counts.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; set evaluation.ucf101.dataset to the unpacked UCF-101")
    listed = _listed(folder)
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
    by_name = {f"{path.parent.name}/{path.name}": path for path in found}
    names = sorted(by_name) if listed is None else listed
    missing = [name for name in names if name not in by_name]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} clips of the official lists are missing, the first is {missing[0]}; "
            "unpack the data set again"
        )
    if not names:
        raise UserError(f"{folder}: no clips found; expected <Class>/v_<Class>_gNN_cNN.avi")
    dataset = Dataset(folder, tuple((name.split("/")[0], by_name[name]) for name in names))
    if official:
        _check_official(dataset)
    return dataset


def _listed(folder: Path) -> list[str] | None:
    """Return `Class/file` of both lists of the first official split, sorted; None when the folder has no lists."""
    files = {path.name: path for path in sorted(folder.rglob("t*list01.txt"))}
    if not files:
        return None
    wanted = ("trainlist01.txt", "testlist01.txt")
    lacking = [name for name in wanted if name not in files]
    if lacking:
        raise UserError(f"{folder}: {lacking[0]} is missing; add the folder ucfTrainTestlist of the data set")
    lines = [line.split()[0] for name in wanted for line in files[name].read_text().splitlines() if line.strip()]
    return sorted(set(lines))


def _check_official(dataset: Dataset) -> None:
    histogram = dataset.histogram
    if len(dataset.clips) != OFFICIAL_CLIPS:
        raise UserError(f"{dataset.folder}: {len(dataset.clips)} clips, UCF-101 has {OFFICIAL_CLIPS}")
    for label, count in OFFICIAL_COUNTS.items():
        if histogram.get(label) != count:
            raise UserError(f"{dataset.folder}: {histogram.get(label, 0)} clips of {label}, UCF-101 has {count}")


def captions(dataset: Dataset) -> dict[str, str]:
    """Read the captions of a fixture, by class, from its `prompts.json`; raises UserError when it can't be used."""
    path = dataset.folder / "prompts.json"
    try:
        prompts = dict(json.loads(path.read_text())["prompts"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: no captions of the fixture's classes ({error}); run the stage sources again"
        ) from None
    missing = [label for label in dataset.histogram if label not in prompts]
    if missing:
        raise UserError(f"{path}: no caption for class {missing[0]}; run the stage sources again")
    return prompts


def prompt_list(histogram: dict[str, int], samples: int, prompts: Mapping[str, str] | None = None) -> list[Item]:
    """Return `samples` prompts with the class histogram of the data set (App. E.4), class by class.

    prompts: text by class; None: the raw class identifier ("TableTennisShot"). With fewer or more samples than clips
    the counts keep their proportions by largest remainders. Ties are broken by the hash of the name, since the first
    classes of the alphabet would be a biased choice.
    """
    total = sum(histogram.values())
    exact = {label: samples * count / total for label, count in histogram.items()}
    counts = {label: int(value) for label, value in exact.items()}
    order = sorted(histogram, key=lambda label: (counts[label] - exact[label], sha256(label.encode()).digest()))
    for label in order[: samples - sum(counts.values())]:
        counts[label] += 1
    labels = [label for label in sorted(counts) for _ in range(counts[label])]
    return [Item(number, label, label if prompts is None else prompts[label]) for number, label in enumerate(labels)]


def read_real(dataset: Dataset, number: int, protocol: EvalProtocol) -> Tensor:
    """Read real clip `number` with the protocol's frames, (T, 3, H, W) uint8; raises UserError for a broken file."""
    label, path = dataset.clips[number]
    frames, rate = read_frames(path)
    try:
        chosen = protocol.real_frames(f"{label}/{path.name}", len(frames), rate)
    except ScoreError as error:
        raise UserError(f"{path}: {error}; the file is damaged, get it again") from None
    return torch.from_numpy(frames[chosen]).permute(0, 3, 1, 2).contiguous()


_GROUP = re.compile(r"(.+_g\d+)_c\d+")


def group_numbers(names: Sequence[str]) -> list[int]:
    """Return the group number of each clip, by its name without ending; groups count in order of appearance.

    UCF-101 cuts several clips from one video: `v_<Class>_g01_c01`, `_c02`, … are alike and stay together wherever the
    set is divided. A clip with another kind of name is a group of its own.

    >>> group_numbers(["v_Punch_g01_c01", "v_Punch_g02_c01", "v_Punch_g01_c02", "mine"])
    [0, 1, 0, 2]
    """
    groups: dict[str, int] = {}
    for name in names:
        found = _GROUP.fullmatch(name)
        groups.setdefault(found[1] if found else name, len(groups))
    return [groups[found[1] if (found := _GROUP.fullmatch(name)) else name] for name in names]


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of `numbers`, evenly spaced."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[i * len(numbers) // count] for i in range(count)]
