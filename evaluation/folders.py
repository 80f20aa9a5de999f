"""Scores of two folders of clips under several protocols at once: how far "the FVD" of one and the same clips diverges.

For clips from anywhere: ours, another model's, downloaded ones. Which clips are taken, and which frames of them,
depends on the files' names alone; nothing is repeated to fill up a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from evaluation.batches import Collector, FeatureSet
from evaluation.features import Extractor, check_overlap, hash_path, load_extractor, metric_name
from evaluation.fvd import distance
from evaluation.protocol import TRANSNETV2, EvalProtocol, named_protocols
from evaluation.results import Result, Row, Score
from svd.stage import UserError
from svd.video import read_frames

_SUFFIXES = {".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm"}


def protocols(
    names: Sequence[str], *, transnetv2: bool = False, frames: int | None = None, samples: int | None = None
) -> list[EvalProtocol]:
    """Named protocols, optionally with other features, frames or numbers of clips (which changes their digests).

    transnetv2: the offline network instead of the protocol's own. Raises UserError for an unknown name.
    """
    known = named_protocols()
    found = []
    for name in names:
        if name not in known:
            raise UserError(f"no protocol '{name}'; known: {', '.join(known)}")
        protocol = known[name]
        if transnetv2:
            protocol = replace(protocol, net=TRANSNETV2)
        if frames is not None:
            protocol = replace(protocol, frames=frames)
        if samples is not None:
            protocol = replace(protocol, real=samples, generated=samples)
        found.append(protocol)
    return found


def choose(folder: Path, count: int | None) -> list[Path]:
    """All clips below `folder`, or `count` of them, ordered by the hash of their names: a random subset of any layout.

    (The first 2048 in the order of the names would be the first few classes of a data set.) Raises UserError when there
    are too few.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = [path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES]
    files.sort(key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest())
    if len(files) < max(2, count or 0):
        raise UserError(
            f"{folder}: {len(files)} clips, the protocol needs {count or 2}; add clips or set the number of samples"
        )
    return files[:count]


def folder_features(
    folder: Path, protocol: EvalProtocol, extractor: Extractor, work: Path, *, real: bool, batch_size: int = 8
) -> FeatureSet:
    """Features of the clips in `folder`, kept in `work` by what they depend on: protocol and the files' contents."""
    files = choose(folder, protocol.real if real else protocol.generated)
    contents = hashlib.sha256("".join(hash_path(path) for path in files).encode()).hexdigest()[:16]
    collector = Collector(work / protocol.digest() / contents, protocol, extractor, batch_size)

    def make(numbers: list[int]) -> Tensor:
        return torch.cat([_pictures(files[number], folder, protocol, real) for number in numbers])

    return collector.collect("real" if real else "generated", len(files), make)


def _pictures(path: Path, folder: Path, protocol: EvalProtocol, real: bool) -> Tensor:
    frames, rate = read_frames(path)
    chosen = protocol.frame_numbers(path.relative_to(folder).as_posix(), len(frames), rate)
    clip = torch.from_numpy(frames[chosen]).permute(0, 3, 1, 2)[None]
    return protocol.pictures(clip, real=real)


def score_folders(
    real: Path,
    generated: Path,
    wanted: Sequence[EvalProtocol],
    work: Path,
    *,
    weights: str | None = None,
    sha256: str | None = None,
    device: str = "cpu",
) -> list[Row]:
    """One row a protocol: distance of the clips in `generated` from those in `real`.

    weights, sha256: the file of the protocols' network. Raises UserError for missing files and unusable clips.
    """
    rows: list[Row] = []
    for protocol in wanted:
        extractor = load_extractor(protocol.net, weights, sha256, device)
        pinned = protocol.with_weights(extractor.sha256)
        sets = [folder_features(f, pinned, extractor, work, real=f is real) for f in (real, generated)]
        warnings = check_overlap(sets[0].digests, sets[1].digests)
        score = Score(generated.name, None, distance(sets[0].state(), sets[1].state(), pinned.ddof))
        metric = metric_name(extractor.net, extractor.sha256)
        result = Result(
            real.name, metric, extractor.weights, pinned.describe(), {}, (score,), (*warnings, *score.distance.warnings)
        )
        rows.extend(replace(row, protocol=f"{protocol.name} {row.protocol}") for row in result.rows())
    return rows
