"""Features of many clips, batch by batch.

Each finished batch is a file, so a killed evaluation goes on where it stopped.
"""

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
from svd.media.video import Frames
from svd.storage import write_bytes


@dataclass(frozen=True)
class FeatureSet:
    """Features (N, d) float32 of N clips, in the order of the clips' numbers.

    digests: of what the network saw of each clip. clips: those to be shown, (T, H, W, 3) uint8, by number. pixel_sum:
    the sum over clips and frames, (3, H, W). groups: the number of each clip's group; clips of one group aren't
    independent draws, so they share a block of the jackknife.
    """

    features: NDArray[np.float32]
    digests: tuple[str, ...]
    clips: dict[int, Frames]
    pixel_sum: NDArray[np.float64]
    frames: int
    groups: tuple[int, ...]

    def state(self) -> MomentState:
        """Return the moments of all clips, in blocks of whole groups."""
        return MomentState.of(self.features, self.groups)

    def halves(self) -> tuple[MomentState, MomentState]:
        """Return the moments of the groups with even numbers, and of those with odd numbers."""
        groups = np.asarray(self.groups)
        chosen = [groups % 2 == parity for parity in (0, 1)]
        first, second = (MomentState.of(self.features[which], groups[which] // 2) for which in chosen)
        return first, second

    def identity(self) -> str:
        """Return a name of the set (16 hex digits), made from what the network saw, in order, and the groups."""
        return hashlib.sha256(json.dumps([self.digests, self.groups]).encode()).hexdigest()[:16]

    def mean_image(self) -> NDArray[np.float64]:
        """Return the mean over all clips and frames, (3, H, W), 0..255."""
        return self.pixel_sum / (len(self.features) * self.frames)


@dataclass(frozen=True)
class Collector:
    """Computes feature sets into `folder`, with `batch_size` clips per file."""

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
        """Return the features of clips 0..total-1.

        make: returns the clips of given numbers, (B, T, 3, H, W) in 0..255, at the size of the comparison; it is called
        only for batches that aren't on disk yet. keep: numbers of the clips to keep. groups: the group of each clip
        (None: every clip is one).
        """
        parts: list[_Batch] = []
        with _progress() as progress:
            task, done = progress.add_task(name, total=total), 0
            while done < total:
                path = self.folder / name / f"batch-{done:06d}.safetensors"
                numbers = list(range(done, min(done + self.batch_size, total)))
                # A batch on disk may be of another size: the run that made it may have had another `batch_size`.
                parts.append(_read(path) or self._compute(path, numbers, make, set(keep)))
                done += len(parts[-1].features)
                progress.update(task, completed=done)
        return _joined(parts, range(total) if groups is None else groups)

    def _compute(self, path: Path, numbers: list[int], make: Callable[[list[int]], Tensor], keep: set[int]) -> _Batch:
        images = make(numbers)
        features = self.extractor.features(self.protocol, images)
        seen = self.protocol.detector_input(images).cpu()
        rounded = self.protocol.rounded(images).cpu()
        kept = {
            number: rounded[i].permute(0, 2, 3, 1).contiguous().numpy()
            for i, number in enumerate(numbers)
            if number in keep
        }
        pixel_sum = images.double().sum(dim=(0, 1)).cpu().numpy()
        batch = _Batch(features, tuple(clip_digest(clip) for clip in seen), kept, pixel_sum, int(images.shape[1]))
        batch.write(path)
        return batch


@dataclass(frozen=True)
class _Batch:
    features: NDArray[np.float32]
    digests: tuple[str, ...]
    clips: dict[int, Frames]
    pixel_sum: NDArray[np.float64]
    frames: int

    def write(self, path: Path) -> None:
        tensors: dict[str, NDArray] = {"features": self.features, "pixel_sum": self.pixel_sum}
        tensors.update({f"clip.{number}": clip for number, clip in self.clips.items()})
        write_bytes(path, packed(tensors, {"digests": self.digests, "frames": self.frames}))


def _read(path: Path) -> _Batch | None:
    """Read a finished batch; None when there is none.

    A file that can't be read counts as missing, and is removed: writes are atomic, so the disk has damaged it.
    """
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
    """Return the state of `count` copies of one clip's features (1, d): a set without any spread."""
    return MomentState.of(np.repeat(features, count, axis=0))


def noise_clips(shape: tuple[int, ...], seeds: Sequence[int]) -> Tensor:
    """Draw uniform noise in 0..255, one clip of `shape` (T, 3, H, W) per seed."""
    clips = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        clips.append(torch.rand(shape, generator=generator) * 255)
    return torch.stack(clips)
