"""Pixels for training the first stage: short windows of curated clips, drawn as a function of (seed, step) alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svd.curation.catalog import read_clips
from svd.data.frames import UnreadableClip, decode, fit
from svd.data.loader import generator, shuffled
from svd.data.shards import read_clip
from svd.stage import UserError

CACHE_BYTES = 2 << 30
LONGEST_READ = 64


class ClipPixels:
    """Frames of curated clips at one size, decoded when asked for; the latest `CACHE_BYTES` of them stay in memory.

    folder: the output of the curation stage; rows: catalogue rows. Of a clip at most its first 64 frames are used.
    Raises UserError when there are no rows, or none with `frames` frames.
    """

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, Any]], frames: int, height: int, width: int) -> None:
        self.folder, self.frames, self.height, self.width = folder, frames, height, width
        self.rows = sorted((row for row in rows if row["frames"] >= frames), key=lambda row: row["clip_id"])
        if not self.rows:
            raise UserError(
                f"{folder}: none of {len(rows)} kept clips has {frames} frames; loosen the curation's filters or lower "
                "'autoencoder.frames'"
            )
        self._cache: OrderedDict[int, Tensor] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.rows)

    def clip(self, index: int) -> Tensor:
        """Frames (T, 3, height, width) uint8 of clip `index`."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        row = self.rows[index]
        try:
            pictures = decode(read_clip(self.folder, row), set(range(min(row["frames"], LONGEST_READ))))
        except UnreadableClip as error:
            raise UserError(f"{self.folder}: clip {row['clip_id']} {error}; run the curation again") from None
        clip = fit([pictures[i] for i in sorted(pictures)], self.height, self.width)
        self._cache[index] = clip
        self._bytes += clip.nbytes
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            self._bytes -= self._cache.popitem(last=False)[1].nbytes
        return clip

    def batch(self, seed: int, step: int, clips: int, frames: int, crop: tuple[int, int] | None = None) -> Tensor:
        """Windows (clips, frames, 3, H, W) in [-1, 1] of neighbouring frames; clips come in epochs.

        crop: (height, width) of a random part of the picture (None: all of it).
        """
        windows = []
        for position in range(step * clips, (step + 1) * clips):
            epoch, place = divmod(position, len(self))
            clip = self.clip(shuffled(place, len(self), f"{seed}/autoencoder/{epoch}"))
            source = generator(seed, position, "autoencoder-window")
            start = _draw(len(clip) - frames, source)
            height, width = crop or (self.height, self.width)
            top, left = _draw(self.height - height, source), _draw(self.width - width, source)
            windows.append(clip[start : start + frames, :, top : top + height, left : left + width])
        return to_signed(torch.stack(windows))

    def examples(self, count: int) -> Tensor:
        """The first `frames` frames of up to `count` clips, (count, frames, 3, H, W) in [-1, 1]."""
        return to_signed(torch.stack([self.clip(i)[: self.frames] for i in range(min(count, len(self)))]))


def _draw(last: int, source: torch.Generator) -> int:
    return int(torch.randint(last + 1, (), generator=source))


def to_signed(frames: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    return frames.float() / 127.5 - 1


def split_rows(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Kept clips for training and held-out ones: those of sources under `test/`, or else every tenth clip by id.

    Raises UserError when the curation kept nothing to train on.
    """
    kept = [row for row in read_clips(folder).iter_rows(named=True) if row["keep"]]
    held_out = [row for row in kept if row["split"] == "test"]
    training = [row for row in kept if row["split"] != "test"]
    if not held_out:
        ordered = sorted(training, key=lambda row: row["clip_id"])
        held_out = ordered[::10]
        training = [row for i, row in enumerate(ordered) if i % 10] or ordered
    if not training:
        raise UserError(f"{folder}: the curation kept no clip to train on; see its funnel.json and loosen the filters")
    return training, held_out
