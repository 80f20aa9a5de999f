"""Pixels for training the autoencoder: short windows of curated clips, drawn as a function of (seed, step) alone."""

from __future__ import annotations

import io
import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor

from svd.catalogue.shards import read_clip_bytes
from svd.catalogue.tables import read_clips
from svd.core.errors import UserError
from svd.latents.loader import generator, shuffled
from svd.media.shown import pixel_aspect, shown_frames

CACHE_BYTES = 2 << 30
LONGEST_READ = 32


class ClipPixels:
    """Frames of curated clips at one size, decoded on demand; the latest `CACHE_BYTES` of them stay in memory.

    folder: the output of the curation stage; rows: catalogue rows. At most the first 32 frames of a clip are used.
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
        """Return the frames (T, 3, height, width) uint8 of clip `index`."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        row = self.rows[index]
        clip = read_clip_frames(read_clip_bytes(self.folder, row), LONGEST_READ, self.height, self.width)
        if len(clip) < self.frames:
            raise UserError(
                f"{self.folder}: clip {row['clip_id']} has {len(clip)} readable frames instead of {row['frames']}; "
                "run the curation again"
            )
        self._cache[index] = clip
        self._bytes += clip.nbytes
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            self._bytes -= self._cache.popitem(last=False)[1].nbytes
        return clip

    def batch(self, seed: int, step: int, clips: int, frames: int, crop: tuple[int, int] | None = None) -> Tensor:
        """Return windows (clips, frames, 3, H, W) in [-1, 1] of neighbouring frames; clips come in epochs.

        crop: (height, width) of a random part of the frame (None: all of it).
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
        """Return the first `frames` frames of up to `count` clips, (count, frames, 3, H, W) in [-1, 1]."""
        return to_signed(torch.stack([self.clip(i)[: self.frames] for i in range(min(count, len(self)))]))


def _draw(last: int, source: torch.Generator) -> int:
    return int(torch.randint(last + 1, (), generator=source))


def read_clip_frames(video: bytes, most: int, height: int, width: int) -> Tensor:
    """Decode the first frames of an mp4, at most `most`, scaled and cropped to (height, width): (T, 3, H, W) uint8.

    They are what players show. The decoder's own scaler averages areas while it converts colours, so no full-size image
    is ever made; frames after a broken one are left out.
    """
    frames: list[Tensor] = []
    try:
        with av.open(io.BytesIO(video), "r") as container:
            stream = container.streams.video[0]
            decoded = itertools.islice(container.decode(stream), most)
            for shown in shown_frames(decoded, pixel_aspect(stream)):
                across, down = shown.showing.size(shown.frame.width, shown.frame.height)
                scale = max(width / across, height / down)
                size = max(width, round(across * scale)), max(height, round(down * scale))
                image = shown.rgb(size, interpolation="AREA")
                top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
                frames.append(torch.from_numpy(image[top : top + height, left : left + width].copy()))
    except (av.error.FFmpegError, IndexError):
        # What was decoded before the damage is good; the caller judges whether it's enough.
        return _stacked(frames, height, width)
    return _stacked(frames, height, width)


def _stacked(frames: list[Tensor], height: int, width: int) -> Tensor:
    if not frames:
        return torch.empty(0, 3, height, width, dtype=torch.uint8)
    return torch.stack(frames).permute(0, 3, 1, 2).contiguous()


def to_signed(frames: Tensor) -> Tensor:
    """Convert uint8 to float in [-1, 1]."""
    return frames.float() / 127.5 - 1


def split_rows(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split the kept clips into training and held-out ones: those of sources under `test/`, else every tenth by id.

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
