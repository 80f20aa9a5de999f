"""Batches of training examples: which samples a step has, shared by the ranks, read ahead of it by workers.

All samples of a step are of one bucket, which means of one length and size. A step's samples are a function of (seed,
step) alone, on any number of ranks and workers, so a training resumes from the number of its next step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from svd.core.errors import UserError
from svd.latents.cache import digest
from svd.latents.loader import Batch, Examples, shuffled

# Workers are no forks of this process: what its threads hold would stay locked in them, and a fork of a process in
# which Prefect (3.8) has sent logs fails at its end.
START_METHOD = "forkserver"


class Order:
    """Which bucket each step is of: a random order in which every sample of every bucket comes equally often.

    Of `samples[b]` samples in batches of `sizes[b]`, e epochs have floor(e x samples / size) batches. Within an epoch
    the batches of all buckets are shuffled. A single bucket's batches keep their order: its samples are shuffled.
    """

    def __init__(self, samples: Sequence[int], sizes: Sequence[int], seed: int) -> None:
        self.samples, self.sizes, self.seed = samples, sizes, seed

    def at(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and the number of its batch in that bucket; each number comes once."""
        if len(self.sizes) == 1:
            return 0, step
        # An epoch of a bucket with fewer samples than a batch may have no batch, but `size` epochs have one.
        longest = range((step + len(self.sizes)) * max(self.sizes) + 1)
        epoch = bisect_right(longest, step, key=lambda epoch: sum(self._before(epoch))) - 1
        before = self._before(epoch)
        counts = [end - start for start, end in zip(before, self._before(epoch + 1), strict=True)]
        place = shuffled(step - sum(before), sum(counts), f"{self.seed}/buckets/{epoch}")
        ends = list(accumulate(counts))
        bucket = bisect_right(ends, place)
        return bucket, before[bucket] + place - (ends[bucket] - counts[bucket])

    def _before(self, epoch: int) -> list[int]:
        """Return the number of batches of each bucket before an epoch."""
        return [epoch * samples // size for samples, size in zip(self.samples, self.sizes, strict=True)]


class Buckets(Dataset[Batch]):
    """The examples of several buckets, B, under one index: sample i of bucket b is sample B i + b of all.

    sizes: samples of a batch, by bucket.
    """

    def __init__(self, examples: Sequence[Examples], sizes: Sequence[int], seed: int) -> None:
        self.examples, self.order = examples, Order([len(bucket) for bucket in examples], sizes, seed)

    def indices(self, step: int) -> range:
        """Return the global sample indices of a step's batch."""
        bucket, number = self.order.at(step)
        first, count = number * self.order.sizes[bucket], len(self.examples)
        return range(count * first + bucket, count * (first + self.order.sizes[bucket]), count)

    def __getitem__(self, index: int) -> Batch:
        number, bucket = divmod(index, len(self.examples))
        return {**self.examples[bucket][number], "index": torch.tensor(index)}

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """Read the samples of a batch; torch's loader calls it."""
        return self.examples[0].cache.each(self.__getitem__, indices)

    def sources(self, index: int) -> list[Mapping[str, Any]]:
        """Return the index rows that a global sample is read from, as `Examples.sources` does."""
        number, bucket = divmod(index, len(self.examples))
        return self.examples[bucket].sources(number)


def bucket_seed(seed: int, bucket: int) -> int:
    """Return the seed of a bucket's draws; the first one's is the training's own, as without buckets."""
    return int(digest(seed, bucket)[:12], 16) if bucket else seed


def in_order(size: int) -> Callable[[int], range]:
    """Return what gives the sample indices of a batch when they just follow each other."""
    return lambda batch: range(batch * size, (batch + 1) * size)


class Steps(Sampler[list[int]]):
    """The global sample indices of one rank's share of `batches`, given those of a whole batch.

    With 2 ranks and batches of 4 in order, rank 0 takes 0, 2, then 4, 6, and rank 1 takes 1, 3, then 5, 7.
    """

    def __init__(self, indices: Callable[[int], range], batches: range, rank: int = 0, ranks: int = 1) -> None:
        self.indices, self.batches, self.rank, self.ranks = indices, batches, rank, ranks

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield list(self.indices(batch)[self.rank :: self.ranks])


def _in_one_line(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches. Raise what a worker says to a user without its traceback, which torch puts in front of it."""
    try:
        yield from batches
    except UserError as error:
        name = f"{type(error).__module__}.{type(error).__qualname__}: "
        raise type(error)(str(error).rpartition(name)[2].strip()) from None


class IndexedLoader:
    """One rank's shares of the batches of `steps` steps, each in `parts` batches; its state is the next one's number.

    `__len__` counts the batches of the whole run: without it Lightning fetches a batch ahead and skips it when
    resuming. ranks x parts must divide every bucket's size.
    """

    def __init__(
        self, buckets: Buckets, steps: int, parts: int = 1, rank: int = 0, ranks: int = 1, num_workers: int = 0
    ) -> None:
        self.buckets, self.steps, self.parts = buckets, steps, parts
        self.rank, self.ranks, self.num_workers = rank, ranks, num_workers
        self.next = 0

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[Batch]:
        batches = DataLoader(
            self.buckets,
            batch_sampler=Steps(self._indices, range(self.next, len(self)), self.rank, self.ranks),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=START_METHOD if self.num_workers else None,
        )
        for batch in _in_one_line(batches):
            self.next += 1
            yield batch

    def _indices(self, batch: int) -> range:
        """Return the global sample indices of a part of a step."""
        step, part = divmod(batch, self.parts)
        whole = self.buckets.indices(step)
        size = len(whole) // self.parts
        return whole[part * size : (part + 1) * size]

    def state_dict(self) -> dict[str, int]:
        """Return the next batch's number, which Lightning stores in a checkpoint."""
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the batch of a checkpoint."""
        self.next = state["next"]
