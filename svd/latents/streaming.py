"""Latent shards that lie in a store: rows of them are read by ranges, and none is brought to this machine's disk.

A row of a tensor is one range of its safetensors file, so samples come in the same random order as from a disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svd import storage
from svd.model.safetensors import DTYPES
from svd.stage import STREAMED

FIRST = 4096  # bytes of the first request: headers of shards have about 400


def streamed_shards(folder: Path) -> dict[str, str]:
    """Return where the shards lie that a cache lacks, by name; none for a cache that is whole."""
    listing = folder / STREAMED
    found: dict[str, str] = json.loads(listing.read_text()) if listing.is_file() else {}
    return {Path(relative).name: location for relative, location in found.items()}


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor (N, ...) of a shard, which begins at byte `first`; a row is read when it is asked for."""

    shard: StreamedShard
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int

    def __getitem__(self, number: int) -> Tensor:
        if not 0 <= number < self.shape[0]:
            raise IndexError(f"it has {self.shape[0]} rows")
        size = torch.Size(self.shape[1:]).numel() * self.dtype.itemsize
        data = bytearray(self.shard.read(self.first + number * size, size))
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape[1:])


class StreamedShard:
    """The safetensors file that is at a location now; when another one replaces it, reading fails.

    Raises FileNotFoundError when it is missing, OSError when its size isn't what its header says, UserError when the
    store refuses, and svd.core.retries.Unreachable when it doesn't answer in all attempts.
    """

    def __init__(self, location: str) -> None:
        self.read, size = storage.ranges(location)
        start = self.read(0, min(FIRST, size)) if size else b""
        header = 8 + int.from_bytes(start[:8], "little")
        if header > size:
            raise OSError(f"{size} bytes, its header alone needs {header}")
        try:
            text = start[8:header] if header <= FIRST else self.read(8, header - 8)
            self._tensors: dict[str, Any] = json.loads(text)
            ends = [entry["data_offsets"][1] for name, entry in self._tensors.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f"no safetensors file: {error}") from None
        if size != header + max(ends, default=0):
            raise OSError(f"{size} bytes instead of {header + max(ends, default=0)}")
        self._data = header

    def get_slice(self, name: str) -> StreamedTensor:
        """Return a tensor of which rows can be read; raises OSError when there is none of this name."""
        if name not in self._tensors:
            raise OSError(f"it has no {name}")
        entry = self._tensors[name]
        return StreamedTensor(
            self, DTYPES[entry["dtype"]], tuple(entry["shape"]), self._data + entry["data_offsets"][0]
        )
