"""The checkpoints of a phase on the disk: `step=<n>.ckpt`, a file or the folder of a sharded one; several are kept.

One that a disk has damaged is noticed before it is loaded, by the checksums that torch writes, and removed; the one
before it is taken.
"""

from __future__ import annotations

import errno
import io
import logging
import pickle
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader

from svd.core.files import exclusive

logger = logging.getLogger(__name__)
PATTERN = "step=*.ckpt"
_DAMAGE = (None, errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.EINVAL)  # what a damaged checkpoint makes of a reading
METADATA = "meta.pt"  # Lightning's name for what is neither a weight nor a state of the optimiser


class Damaged(Exception):
    """A checkpoint isn't what was written."""


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint's name."""
    return int(checkpoint.stem.removeprefix("step="))


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a phase, the newest first."""
    return sorted(folder.glob(PATTERN), key=step_of, reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole, or None; damaged ones are named in the log and removed.

    Reads all of it. Ranks that share the folder may call it at once.
    """
    if not folder.is_dir():
        return None
    with exclusive(folder / ".checkpoints.lock"):
        for path in checkpoints(folder):
            try:
                require_whole(path)
            except Damaged as error:
                logger.warning("%s is damaged (%s) and removed; the one before it is taken, if any", path, error)
                remove(path)
            else:
                return path
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`, with what was derived from them, and what killed writers left.

    Only for the writer of the checkpoints, when none is being written.
    """
    for path in checkpoints(folder)[keep:]:
        remove(path)
    for path in folder.glob(f"{PATTERN}.part"):
        _discard(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint and what lies beside it under a longer name."""
    for path in [checkpoint, *checkpoint.parent.glob(f"{checkpoint.name}.*")]:
        _discard(path)


def _discard(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def require_whole(checkpoint: Path) -> None:
    """Raise Damaged unless every part of a checkpoint has the checksum with which it was written.

    Raises OSError when it can't be read for another reason than damage.
    """
    try:
        if checkpoint.is_dir():
            _require_whole_shards(checkpoint)
        else:
            with checkpoint.open("rb") as stream:
                _require_whole_archive(stream, checkpoint.name)
    except OSError as error:
        if error.errno not in _DAMAGE:  # no access, or too many open files: what is written may be whole
            raise
        raise Damaged(str(error)) from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise Damaged(str(error).strip() or type(error).__name__) from error


def _require_whole_archive(stream: IO[bytes], name: str) -> None:
    try:
        with zipfile.ZipFile(stream) as archive:
            bad = archive.testzip()
        if bad:
            raise Damaged(f"{bad} in {name} has another checksum")
        stream.seek(0)
        torch.load(stream, map_location="meta", weights_only=True)  # its reader is stricter; "meta" keeps no tensor
    # A flipped bit in the directory asks for a password, a compression or a later version of the format.
    except (zlib.error, RuntimeError) as error:
        raise Damaged(f"{name}: {str(error).partition(chr(10))[0]}") from error


def _require_whole_shards(folder: Path) -> None:
    """Check the archives that DCP's files consist of, one per tensor, and Lightning's own file beside them."""
    stored: dict[Any, Any] = FileSystemReader(folder).read_metadata().storage_data
    for item in stored.values():
        with (folder / item.relative_path).open("rb") as stream:
            stream.seek(item.offset)
            _require_whole_archive(io.BytesIO(stream.read(item.length)), item.relative_path)
    with (folder / METADATA).open("rb") as stream:
        _require_whole_archive(stream, METADATA)
