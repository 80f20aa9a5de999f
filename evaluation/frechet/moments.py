"""Mergeable moments of feature vectors: all that a Fréchet or a second-degree kernel distance needs.

The scatter matrix `M2 = Σ (x − μ)(x − μ)ᵀ` is held as a root `R` with `RᵀR = M2`. Chan's merge becomes stacking of
rows: `R = [R₁; R₂; √(n₁n₂/(n₁+n₂)) (μ₂ − μ₁)]`. No covariance is formed, so no condition number is squared, and with
fewer samples than dimensions the state is as small as the features. Sixteen blocks are kept apart for the jackknife.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from svd.core.errors import UserError
from svd.storage import write_bytes

BLOCKS = 16

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Moments of `count` vectors of size d: mean (d,), root (r, d) of the scatter matrix, and Σ (x·x)²."""

    count: int
    mean: Array
    root: Array
    quartic: float

    @staticmethod
    def empty(dimension: int) -> Moments:
        """Return the moments of no vectors."""
        return Moments(0, np.zeros(dimension), np.zeros((0, dimension)), 0.0)

    @staticmethod
    def of(features: ArrayLike) -> Moments:
        """Return the moments of `features` (N, d), summed in float64.

        Raises ValueError for a wrong shape and for values that aren't finite.
        """
        values = np.asarray(features, dtype=np.float64)
        if values.ndim != 2:
            raise ValueError(f"features must have the shape (N, d), got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("features contain NaN or infinite values")
        if not len(values):
            return Moments.empty(values.shape[1])
        mean = values.mean(axis=0)
        quartic = float(((values**2).sum(axis=1) ** 2).sum())
        return Moments(len(values), mean, values - mean, quartic)._compressed(2)

    @property
    def dimension(self) -> int:
        """d, the size of a feature vector."""
        return int(self.mean.shape[0])

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together (Chan, Golub, LeVeque 1979); associative and commutative."""
        if self.dimension != other.dimension:
            raise ValueError(f"cannot merge moments of {self.dimension} and {other.dimension} dimensions")
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        step = np.sqrt(self.count * other.count / count) * difference
        root = np.concatenate([self.root, other.root, step[None]])
        return Moments(count, mean, root, self.quartic + other.quartic)._compressed(2)

    def _compressed(self, slack: int) -> Moments:
        """Return the same moments with at most `slack`·d rows; QR keeps RᵀR up to rounding."""
        if len(self.root) <= slack * self.dimension:
            return self
        return Moments(self.count, self.mean, np.asarray(np.linalg.qr(self.root, mode="r")), self.quartic)

    def compressed(self) -> Moments:
        """Return the same moments with a root of at most d rows."""
        return self._compressed(1)

    def scatter(self) -> Array:
        """Return M2 = Σ (x − μ)(x − μ)ᵀ, (d, d)."""
        return self.root.T @ self.root

    def raw_root(self) -> Array:
        """Return G (r + 1, d) with GᵀG = E[x xᵀ], the second moment about zero."""
        return np.concatenate([self.root / np.sqrt(self.count), self.mean[None]])


@dataclass(frozen=True)
class MomentState:
    """Moments of a stream of clips in `BLOCKS` blocks; a clip belongs to the block `index % BLOCKS`.

    Clips that are alike, such as those cut from one video, must share their index. With similar clips in every block,
    leaving one block out changes too little, and the jackknife's error bar is too small.
    """

    blocks: tuple[Moments, ...]

    @staticmethod
    def of(features: ArrayLike, index: Sequence[int] | NDArray[np.int64] | None = None) -> MomentState:
        """Return the state of `features` (N, d); index (N,): numbers of the clips or of their groups."""
        values = np.asarray(features, dtype=np.float64)
        numbers = np.arange(len(values)) if index is None else np.asarray(index)
        if len(numbers) != len(values):
            raise ValueError(f"{len(values)} feature vectors but {len(numbers)} clip numbers")
        return MomentState(tuple(Moments.of(values[numbers % BLOCKS == b]) for b in range(BLOCKS)))

    @property
    def count(self) -> int:
        """Number of clips."""
        return sum(block.count for block in self.blocks)

    @property
    def dimension(self) -> int:
        """Size of a feature vector."""
        return self.blocks[0].dimension

    def merge(self, other: MomentState) -> MomentState:
        """Return the state of both streams together, block by block."""
        return MomentState(tuple(a.merge(b) for a, b in zip(self.blocks, other.blocks, strict=True)))

    def total(self) -> Moments:
        """Return the moments of all clips."""
        return reduce(Moments.merge, self.blocks).compressed()

    def filled(self) -> list[int]:
        """Return the numbers of the blocks that hold clips."""
        return [number for number, block in enumerate(self.blocks) if block.count]

    def window(self, start: int, length: int) -> Moments:
        """Return the moments of `length` consecutive blocks from `start`; after the last block follows the first."""
        chosen = [self.blocks[(start + i) % BLOCKS] for i in range(length)]
        return reduce(Moments.merge, chosen).compressed()

    def leave_one_out(self) -> list[Moments]:
        """Return for each block the moments of all the others.

        Merges of prefixes and suffixes take 3·16 merges instead of 16·15.
        """
        empty = Moments.empty(self.dimension)
        before, after = [empty], [empty]
        for block in self.blocks[:-1]:
            before.append(before[-1].merge(block))
        for block in self.blocks[:0:-1]:
            after.append(block.merge(after[-1]))
        return [a.merge(b).compressed() for a, b in zip(before, reversed(after), strict=True)]


def save_state(path: Path, state: MomentState, metadata: dict[str, str]) -> None:
    """Write a state as safetensors, atomically.

    Roots are padded with zero rows to one height; zero rows don't change RᵀR.
    """
    blocks = [block.compressed() for block in state.blocks]
    height = max(len(block.root) for block in blocks)
    roots = np.zeros((len(blocks), height, state.dimension))
    for number, block in enumerate(blocks):
        roots[number, : len(block.root)] = block.root
    tensors = {
        "count": np.array([block.count for block in blocks], dtype=np.int64),
        "mean": np.stack([block.mean for block in blocks]),
        "root": roots,
        "quartic": np.array([block.quartic for block in blocks]),
    }
    write_bytes(path, packed(tensors, {**metadata, "format": "moments-1"}))


def packed(tensors: Mapping[str, NDArray], about: Mapping[str, object]) -> bytes:
    """Return safetensors bytes. `about` becomes one metadata key, as JSON: several keys are written in random order."""
    ordered = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    return save(ordered, metadata={"about": json.dumps(about, sort_keys=True)})


def load_state(path: Path) -> MomentState:
    """Read what `save_state` wrote; raises UserError for any other file."""
    try:
        tensors = load(path.read_bytes())
        parts = zip(tensors["count"], tensors["mean"], tensors["root"], tensors["quartic"], strict=True)
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: not a file of feature moments ({error}); delete it, it is made again") from None
    blocks = [
        Moments(int(count), mean, root[np.any(root != 0, axis=1)], float(quartic))
        for count, mean, root, quartic in parts
    ]
    return MomentState(tuple(blocks))
