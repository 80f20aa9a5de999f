"""Which clips a training has used: told from its preset and its latent cache alone, as exactly as the loader draws.

The loader's order is a function of (seed, index), so also for a training that ended within its first epoch it is known
which samples it has drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from svd.config import Phase, Preset, TrainingConfig
from svd.latents.batches import Order, bucket_seed
from svd.latents.cache import LatentCache, digest
from svd.latents.index import Rows
from svd.latents.loader import shuffled
from svd.tasks.camera_motions import CAMERAS
from svd.training.stages import select_subset


@dataclass(frozen=True)
class Usage:
    """Clip ids: `trained` were drawn for sure, `perhaps` may have been, `validated` measured the loss only."""

    trained: frozenset[str] = frozenset()
    perhaps: frozenset[str] = frozenset()
    validated: frozenset[str] = frozenset()

    def __or__(self, other: Usage) -> Usage:
        """Return the use by either; a clip that one has trained on is in `trained`."""
        trained = self.trained | other.trained
        perhaps = (self.perhaps | other.perhaps) - trained
        return Usage(trained, perhaps, (self.validated | other.validated) - trained - perhaps)


def training_usage(cache: LatentCache, preset: Preset, stage: str) -> Usage:
    """Return which clips a finished training has used; `stage` is its name, for example `image-to-video`.

    Raises UserError when the cache has nothing that the preset's phases could have used.
    """
    config: TrainingConfig = getattr(preset, stage.replace("-", "_"))
    motions = getattr(config, "motions", [None])
    return _union(
        _phase_usage(cache, preset, stage, motion, number) for motion in motions for number in range(len(config.phases))
    )


def _union(usages: Iterable[Usage]) -> Usage:
    whole = Usage()
    for usage in usages:
        whole |= usage
    return whole


def _phase_usage(cache: LatentCache, preset: Preset, stage: str, motion: str | None, number: int) -> Usage:
    config: TrainingConfig = getattr(preset, stage.replace("-", "_"))
    phase = config.phases[number]
    buckets = [select_subset(cache.rows(size, "train"), config.subset) for size in phase.by_bucket]
    if motion is not None:
        buckets = [rows.where(pl.col("camera").is_in(CAMERAS[motion])) for rows in buckets]
    name = stage if motion is None else f"{stage}/{motion}"
    seed = int(digest(int(digest(preset.seed, name)[:12], 16), number)[:12], 16)
    validated = frozenset(cache.rows(phase, "test").column("clip_id"))
    if phase.image_share:  # images are drawn from all rows, and some clips are replaced by them
        perhaps = _clips(buckets)
        return Usage(perhaps=perhaps, validated=validated - perhaps)
    trained = _clips(drawn(buckets, phase, seed))
    return Usage(trained, validated=validated - trained)


def _clips(buckets: Iterable[Rows]) -> frozenset[str]:
    return frozenset(clip for rows in buckets for clip in rows.column("clip_id"))


def drawn(buckets: Sequence[Rows], phase: Phase, seed: int) -> list[Rows]:
    """Return the rows of each of a phase's buckets that it has drawn, in the loader's order."""
    sizes = [size.batch_size for size in phase.by_bucket]
    order = Order([len(rows) for rows in buckets], sizes, seed)
    numbers: list[set[int]] = [set() for _ in buckets]
    for bucket, number in map(order.at, range(phase.iterations)):
        numbers[bucket].add(number)
    return [
        _drawn(rows, numbers[bucket], sizes[bucket], bucket_seed(seed, bucket)) for bucket, rows in enumerate(buckets)
    ]


def _drawn(rows: Rows, batches: set[int], size: int, seed: int) -> Rows:
    """Return the rows of some batches, by number: all of them after one epoch."""
    count = len(rows)
    if batches >= set(range(-(-count // size))):
        return rows
    drawn = (divmod(size * batch + k, count) for batch in batches for k in range(size))
    return rows.take(sorted({shuffled(position, count, f"{seed}/{epoch}") for epoch, position in drawn}))
