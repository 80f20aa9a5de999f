"""Features of many clips, batch by batch: each finished batch is a file, so a killed evaluation goes on where it
stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evaluation.frechet.features import Extractor, clip_digest
from evaluation.frechet.moments import MomentState, packed
from evaluation.frechet.protocol import EvalProtocol
from svd.storage import write_bytes

Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class FeatureSet:
    """Features (N, d) float32 of N clips in the order of their numbers, the digests of what the network saw, the
    kept clips (T, H, W, 3) uint8 by number, and the sum of all pictures over clips and frames (3, H, W).

    groups: the number of each clip's group; clips of one group are no independent draws, so they share a block.
    """

    features: NDArray[np.float32]
    digests: tuple[str, ...]
    clips: dict[int, Pictures]
    pixel_sum: NDArray[np.float64]
    frames: int
    groups: tuple[int, ...]

    def state(self) -> MomentState:
        """Moments of all clips, in blocks of whole groups."""
        return MomentState.of(self.features, self.groups)

    def halves(self) -> tuple[MomentState, MomentState]:
        """Moments of every other group, and of the rest."""
        groups = np.asarray(self.groups)
        chosen = [groups % 2 == parity for parity in (0, 1)]
        first, second = (MomentState.of(self.features[which], groups[which] // 2) for which in chosen)
        return first, second

    def identity(self) -> str:
        """Names the set (16 hex digits): what the network saw, in order, and the groups."""
        return hashlib.sha256(json.dumps([self.digests, self.groups]).encode()).hexdigest()[:16]

    def mean_picture(self) -> NDArray[np.float64]:
        """The mean over all clips and frames, (3, H, W), 0..255."""
        return self.pixel_sum / (len(self.features) * self.frames)


@dataclass(frozen=True)
class Collector:
    """Computes feature sets into `folder`, `batch_size` clips a file."""

    folder: Path
    protocol: EvalProtocol
    extractor: Extractor
    batch_size: int

    def collect(
        self,
        name: str,
        total: int,
        make: Callable[[list[int]], Tensor],
        keep: Sequence[int] = (),
        groups: Sequence[int] | None = None,
    ) -> FeatureSet:
        """Features of clips 0..total-1. `make(numbers)` gives their pictures (B, T, 3, H, W), values 0..255, at the
        size of
        the comparison; it is called only for batches that aren't on disk yet. `keep`: numbers of the clips to keep;
        `groups`: of each clip (None: every clip is one).
        """
        starts = range(0, total, self.batch_size)
        parts: list[_Batch] = []
        with _progress() as progress:
            task = progress.add_task(name, total=total)
            for start in starts:
                numbers = list(range(start, min(start + self.batch_size, total)))
                path = self.folder / name / f"batch-{start:06d}.safetensors"
                batch = _read(path) or self._compute(path, numbers, make, set(keep))
                parts.append(batch)
                progress.advance(task, len(numbers))
        return _joined(parts, range(total) if groups is None else groups)

    def _compute(self, path: Path, numbers: list[int], make: Callable[[list[int]], Tensor], keep: set[int]) -> _Batch:
        pictures = make(numbers)
        features = self.extractor.features(self.protocol, pictures)
        seen = self.protocol.detector_input(pictures).cpu()
        rounded = self.protocol.rounded(pictures).cpu()
        kept = {
            number: rounded[i].permute(0, 2, 3, 1).contiguous().numpy()
            for i, number in enumerate(numbers)
            if number in keep
        }
        pixel_sum = pictures.double().sum(dim=(0, 1)).cpu().numpy()
        batch = _Batch(features, tuple(clip_digest(clip) for clip in seen), kept, pixel_sum, int(pictures.shape[1]))
        batch.write(path)
        return batch


@dataclass(frozen=True)
class _Batch:
    features: NDArray[np.float32]
    digests: tuple[str, ...]
    clips: dict[int, Pictures]
    pixel_sum: NDArray[np.float64]
    frames: int

    def write(self, path: Path) -> None:
        tensors: dict[str, NDArray] = {"features": self.features, "pixel_sum": self.pixel_sum}
        tensors.update({f"clip.{number}": clip for number, clip in self.clips.items()})
        write_bytes(path, packed(tensors, {"digests": self.digests, "frames": self.frames}))


def _read(path: Path) -> _Batch | None:
    """A finished batch; None when there is none. Writes are atomic, so a file that can't be read is treated as
    missing."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError):
        path.unlink()
        return None
    clips = {int(key.split(".")[1]): value for key, value in tensors.items() if key.startswith("clip.")}
    return _Batch(tensors["features"], tuple(about["digests"]), clips, tensors["pixel_sum"], about["frames"])


def _joined(parts: Sequence[_Batch], groups: Sequence[int]) -> FeatureSet:
    return FeatureSet(
        features=np.concatenate([part.features for part in parts]),
        digests=tuple(digest for part in parts for digest in part.digests),
        clips={number: clip for part in parts for number, clip in part.clips.items()},
        pixel_sum=np.sum([part.pixel_sum for part in parts], axis=0),
        frames=parts[0].frames,
        groups=tuple(groups),
    )


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def repeated(features: NDArray[np.float32], count: int) -> MomentState:
    """State of `count` copies of one clip's features (1, d): a set without any spread."""
    return MomentState.of(np.repeat(features, count, axis=0))


def noise_pictures(shape: tuple[int, ...], seeds: Sequence[int]) -> Tensor:
    """Uniform noise 0..255, one clip of `shape` (T, 3, H, W) a seed."""
    clips = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        clips.append(torch.rand(shape, generator=generator) * 255)
    return torch.stack(clips)
