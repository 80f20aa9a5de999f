"""Files of this machine: paths and `file://` URIs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from svd.core.files import atomic_file, exclusive, sha256
from svd.storage.backend import Conflict, Entry, Kind, Location


def local_path(location: Location) -> Path:
    """Return the path of a local location."""
    return Path(str(location).removeprefix("file://"))


class Local:
    """The backend for paths; see svd.storage.backend.Backend."""

    kind: Kind = "local"

    def list(self, location: str) -> Iterator[Entry]:
        """Yield every file below a folder."""
        root = local_path(location)
        for path in root.rglob("*"):
            if path.is_file():
                yield Entry(str(path), path.stat().st_size, path.relative_to(root).as_posix())

    def size(self, location: str) -> int:
        """Return the size in bytes; raises FileNotFoundError for a missing file or a folder."""
        return _require(location).stat().st_size

    def version(self, location: str) -> str:
        """Return size and time of the last change in nanoseconds."""
        about = _require(location).stat()
        return f"{about.st_size}-{about.st_mtime_ns}"

    def stored_sha256(self, location: str) -> str | None:
        """Return the SHA-256 of the file as it is now."""
        return sha256(local_path(location))

    def read(self, location: str, start: int, length: int | None) -> tuple[bytes, str | None]:
        """Read a range."""
        with local_path(location).open("rb") as stream:
            stream.seek(start)
            return stream.read(-1 if length is None else length), None

    def ranges(self, location: str) -> tuple[Callable[[int, int], bytes], int]:
        """Return a reader of ranges of the file that is there now, though it be replaced later."""
        stream = local_path(location).open("rb")
        return lambda start, length: os.pread(stream.fileno(), length, start), os.fstat(stream.fileno()).st_size

    def fetch(self, location: str, path: Path, most: float, seconds: float) -> bool:
        """Copy the file to `path`."""
        shutil.copyfile(local_path(location), path)
        return True

    def put(self, path: Path, location: str) -> None:
        """Copy a file to `location`, atomically."""
        with atomic_file(local_path(location)) as temporary:
            shutil.copyfile(path, temporary)

    def write(self, location: str, data: bytes) -> None:
        """Write a file, atomically."""
        with atomic_file(local_path(location)) as temporary:
            temporary.write_bytes(data)

    def replace(self, location: str, data: bytes, expected: str | None) -> str:
        """Write a file if its version is `expected`, under a lock file beside it (NFS: version 4, with locks)."""
        path = local_path(location)
        with exclusive(path.with_name(f".{path.name}.lock")):
            if (self.version(location) if path.is_file() else None) != expected:
                raise Conflict(f"{location}: another version is stored there")
            before = path.stat().st_mtime_ns if path.is_file() else 0
            with atomic_file(path) as temporary:
                temporary.write_bytes(data)
                if temporary.stat().st_mtime_ns <= before:  # clocks of files are coarse: two writes, one time
                    os.utime(temporary, ns=(before + 1, before + 1))
            return self.version(location)

    def copy_within(self, source: str, target: str) -> None:
        """Copy a file, atomically."""
        self.put(local_path(source), target)

    def remove(self, location: str) -> None:
        """Remove a file; one that is not there is no error."""
        local_path(location).unlink(missing_ok=True)

    def share(self, location: str, seconds: int, content_type: str) -> str:
        """Return the `file://` URI of the absolute path."""
        return _require(location).resolve().as_uri()


def _require(location: str) -> Path:
    path = local_path(location)
    if not path.is_file():
        raise FileNotFoundError(f"{location}: no such file")
    return path
