"""Clip shards: plain WebDataset tars, written byte-deterministically, with (shard, offset, size) for random access.

Any tool reads a tar, and it streams from object storage. The catalogue stores where each clip's bytes lie, so reading a
clip is one `pread` or one HTTP range request, and no tar is scanned. Members carry no time, user or mode of the machine
that wrote them: equal clips give equal bytes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from svd.core.files import atomic_file

BLOCK = tarfile.BLOCKSIZE
COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """The place of one file: `size` bytes at `offset` of the tar named `shard`."""

    shard: str
    offset: int
    size: int


class ShardWriter:
    """Write samples (a key and its files) into tars of about `max_bytes`; each tar appears atomically under its name.

    The first tar is `<stem>.tar`, the next ones are `<stem>-1.tar`, `<stem>-2.tar`…; with `digits`, 6 for example, they
    are `<stem>-000000.tar`, `<stem>-000001.tar`… A sample is never split, so a tar exceeds `max_bytes` only when a
    single sample does. Use it as a context manager: after an exception the open tar is
    removed.

        with ShardWriter(folder, 1 << 30) as writer:
            place = writer.add("clip0", {"mp4": path, "json": b"{}"})["mp4"]
    """

    def __init__(self, folder: Path, max_bytes: int, stem: str = "clips-000000", digits: int = 0) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.stem = stem
        self.digits = digits
        self.names: list[str] = []
        self._file = ExitStack()
        self._stream: BinaryIO | None = None
        self._position = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, key: str, files: Mapping[str, bytes | Path]) -> dict[str, Member]:
        """Append `<key>.<extension>` per item of `files` (bytes, or a file to copy), sorted; return their places."""
        total = sum(BLOCK + _padded(_size(content)) for content in files.values())
        if self._stream is not None and self._position and self._position + total > self.max_bytes:
            self._finish()
        if self._stream is None:
            self._start()
        return {extension: self._append(f"{key}.{extension}", files[extension]) for extension in sorted(files)}

    def close(self) -> None:
        """Publish the open tar."""
        if self._stream is not None:
            self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.__exit__(kind, error, trace)

    def _start(self) -> None:
        number = len(self.names)
        self.names.append(f"{self.stem}-{number:0{self.digits}d}.tar" if number or self.digits else f"{self.stem}.tar")
        temporary = self._file.enter_context(atomic_file(self.folder / self.names[-1]))
        self._stream = self._file.enter_context(temporary.open("wb"))
        self._position = 0

    def _append(self, name: str, content: bytes | Path) -> Member:
        assert self._stream is not None
        size = _size(content)
        info = tarfile.TarInfo(name)
        info.size = size
        info.mode = 0o644
        header = info.tobuf(tarfile.USTAR_FORMAT)
        self._stream.write(header)
        member = Member(self.names[-1], self._position + len(header), size)
        if isinstance(content, Path):
            with content.open("rb") as source:
                while block := source.read(COPY_BYTES):
                    self._stream.write(block)
        else:
            self._stream.write(content)
        self._stream.write(b"\0" * (_padded(size) - size))
        self._position += len(header) + _padded(size)
        return member

    def _finish(self) -> None:
        assert self._stream is not None
        self._stream.write(b"\0" * (2 * BLOCK))
        self._stream = None
        self._file.close()


def _size(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def read_span(path: Path, offset: int, size: int) -> bytes:
    """Read `size` bytes at `offset` of a file; raises OSError that names the file when it is too short."""
    with path.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(size)
    if len(data) != size:
        raise OSError(f"{path}: expected {size} bytes at {offset}, found {len(data)}; the shard was cut short")
    return data


def read_clip_bytes(folder: Path, row: Mapping[str, Any]) -> bytes:
    """Read the mp4 of a catalogue row; `folder` is the output of the stage curation."""
    return read_span(folder / "shards" / row["shard"], row["offset"], row["size"])


def read_thumbnail(folder: Path, row: Mapping[str, Any]) -> bytes:
    """Read the JPEG of the clip's middle frame of a catalogue row."""
    return read_span(folder / "shards" / row["shard"], row["thumbnail_offset"], row["thumbnail_size"])


def iterate_samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the samples of a WebDataset tar in order: key, and contents by extension.

    As in WebDataset, neighbours whose names agree up to the first dot of the base name form one sample. Raises
    tarfile.ReadError for a broken tar.
    """
    key, files = "", dict[str, bytes]()
    with tarfile.open(path, "r:*") as tar:
        for info in tar:
            if not info.isfile():
                continue
            folder, _, base = info.name.rpartition("/")
            stem, _, extension = base.partition(".")
            name = f"{folder}/{stem}" if folder else stem
            if files and name != key:
                yield key, files
                files = {}
            key = name
            content = tar.extractfile(info)
            files[extension] = content.read() if content else b""
    if files:
        yield key, files
