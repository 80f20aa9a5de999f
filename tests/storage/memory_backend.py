"""A storage backend from outside the product: `mem://bucket/key`, a dictionary in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from svd.core.errors import UserError
from svd.storage import Conflict, Entry, sha256, split_uri


class Memory:
    kind = "store"

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}

    def list(self, location: str) -> Iterator[Entry]:
        prefix = location.rstrip("/") + "/"
        for key, (data, digest) in self.objects.items():
            if key.startswith(prefix):
                yield Entry(key, len(data), key.removeprefix(prefix), digest)

    def _at(self, location: str) -> tuple[bytes, str]:
        split_uri(location)
        if location not in self.objects:
            raise FileNotFoundError(f"{location}: no such object")
        return self.objects[location]

    def size(self, location: str) -> int:
        return len(self._at(location)[0])

    def version(self, location: str) -> str:
        return self._at(location)[1]

    def stored_sha256(self, location: str) -> str | None:
        return self._at(location)[1]

    def read(self, location: str, start: int, length: int | None) -> tuple[bytes, str | None]:
        data, digest = self._at(location)
        return data[start : None if length is None else start + length], digest

    def ranges(self, location: str) -> tuple[Callable[[int, int], bytes], int]:
        data = self._at(location)[0]
        return lambda start, length: data[start : start + length], len(data)

    def fetch(self, location: str, path: Path, most: float, seconds: float) -> bool:
        data, digest = self._at(location)
        path.write_bytes(data)
        return sha256(path) == digest

    def put(self, path: Path, location: str) -> None:
        self.write(location, path.read_bytes())

    def write(self, location: str, data: bytes) -> None:
        split_uri(location)
        self.objects[location] = data, hashlib.sha256(data).hexdigest()

    def replace(self, location: str, data: bytes, expected: str | None) -> str:
        if self.objects.get(location, (b"", None))[1] != expected:
            raise Conflict(location)
        self.write(location, data)
        return self.version(location)

    def copy_within(self, source: str, target: str) -> None:
        self.objects[target] = self._at(source)

    def remove(self, location: str) -> None:
        self.objects.pop(location, None)

    def share(self, location: str, seconds: int, content_type: str) -> str:
        raise UserError(f"{location}: memory can't be opened by a browser; download it")
