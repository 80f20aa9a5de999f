"""Scores of two folders of clips under several protocols at once: how far "the FVD" of the same clips diverges.

The clips may come from anywhere: our models, other models, a download. Which clips and which of their frames are taken
depends on the names of the files alone. No clip is repeated to reach a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from evaluation.frechet.batches import Collector, FeatureSet
from evaluation.frechet.distances import distance
from evaluation.frechet.features import Extractor, check_overlap, hash_path, load_extractor, metric_name
from evaluation.frechet.protocol import TRANSNETV2, EvalProtocol, named_protocols
from evaluation.frechet.results import Result, Score
from evaluation.frechet.ucf101_data import group_numbers
from evaluation.tables import Row
from svd.core.errors import UserError
from svd.media.video import read_frames

_SUFFIXES = {".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm"}


def protocols(
    names: Sequence[str], *, transnetv2: bool = False, frames: int | None = None, samples: int | None = None
) -> list[EvalProtocol]:
    """Return named protocols, optionally with other features, frames or numbers of clips (new names and digests).

    transnetv2: use the offline network instead of the protocol's own. Raises UserError for an unknown name.
    """
    known = named_protocols()
    found = []
    for name in names:
        if name not in known:
            raise UserError(f"no protocol '{name}'; known: {', '.join(known)}")
        values: dict[str, object] = {"net": TRANSNETV2} if transnetv2 else {}
        if frames is not None:
            values["frames"] = frames
        if samples is not None:
            values |= {"real": samples, "generated": samples}
        found.append(known[name].changed(**values))
    return found


def clip_name(path: Path, folder: Path) -> str:
    """Return `Class/file` of a clip below `folder`, as UCF-101's lists name it, whatever folders lie between."""
    return "/".join(path.relative_to(folder).parts[-2:])


def choose(folder: Path, count: int | None) -> list[Path]:
    """Return all clips below `folder`, or `count` of them, in the order of the hashes of their names.

    The hash makes a random subset of any layout: the first 2048 names would be the first few classes of a data set.
    Raises UserError when there are too few.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    files.sort(key=lambda path: hashlib.sha256(clip_name(path, folder).encode()).digest())
    if len(files) < max(2, count or 0):
        raise UserError(
            f"{folder}: {len(files)} clips, the protocol needs {count or 2}; add clips or set the number of samples"
        )
    return files[:count]


def folder_features(
    files: Sequence[Path],
    folder: Path,
    protocol: EvalProtocol,
    extractor: Extractor,
    work: Path,
    *,
    real: bool,
    batch_size: int = 8,
) -> FeatureSet:
    """Return the features of `files`, kept in `work` by what they depend on: protocol, names and contents."""
    names = [clip_name(path, folder) for path in files]
    about = "".join(f"{name} {hash_path(path)}\n" for name, path in zip(names, files, strict=True))
    key = hashlib.sha256(about.encode()).hexdigest()[:16]
    collector = Collector(work / protocol.digest() / key, protocol, extractor, batch_size)

    def make(numbers: list[int]) -> Tensor:
        return torch.cat([_images(files[number], names[number], protocol, real) for number in numbers])

    groups = group_numbers([Path(name).with_suffix("").as_posix() for name in names])
    return collector.collect("real" if real else "generated", len(files), make, groups=groups)


def _images(path: Path, name: str, protocol: EvalProtocol, real: bool) -> Tensor:
    frames, rate = read_frames(path)
    count = len(frames)
    chosen = protocol.real_frames(name, count, rate) if real else protocol.generated_frames(name, count)
    clip = torch.from_numpy(frames[chosen]).permute(0, 3, 1, 2)[None]
    return protocol.images(clip, real=real)


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
    """Return one row per protocol: the distance of the clips in `generated` from those in `real`.

    weights, sha256: the file of the protocols' network. Raises UserError for missing files and unusable clips.
    """
    rows: list[Row] = []
    for protocol in wanted:
        extractor = load_extractor(protocol.net, weights, sha256, device)
        files = choose(real, protocol.real), choose(generated, protocol.generated)
        # "All clips" becomes a number, so that two scores of one protocol can't differ in it.
        pinned = replace(protocol.with_weights(extractor.sha256), real=len(files[0]), generated=len(files[1]))
        truth = folder_features(files[0], real, pinned, extractor, work, real=True)
        made = folder_features(files[1], generated, pinned, extractor, work, real=False)
        warnings = check_overlap(truth.digests, made.digests)
        score = Score(generated.name, None, distance(truth.state(), made.state(), pinned.ddof))
        metric = metric_name(extractor.net, extractor.sha256)
        result = Result(
            real.name, metric, extractor.weights, pinned.describe(), {}, (score,), (*warnings, *score.distance.warnings)
        )
        rows.extend(replace(row, protocol=f"{pinned.name} {row.protocol}") for row in result.rows())
    return rows
