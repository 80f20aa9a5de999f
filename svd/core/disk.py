"""A full disk, told in one line that says where, instead of a traceback."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svd.core.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
# as other languages' libraries word it: ffmpeg and Rust, SQLite, torch, NumPy
WORDS = re.compile(
    r"No space left on device|disk is full|Disk quota exceeded|PytorchStreamWriter failed|unexpected pos"
    r"|\d+ requested and \d+ written"
)


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether the error, or one that led to it, says that a disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def full_disk_in_one_line(*folders: Path) -> Iterator[None]:
    """Raise UserError for a disk that is full inside: it names the folder, and how much is free there.

    folders: where something may be written besides the folder for temporary files; of these the fullest is named.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(f"{_describe(folders)}; make room and run the same command again, it goes on") from error


def _describe(folders: tuple[Path, ...]) -> str:
    written = [next(p for p in (path, *path.absolute().parents) if p.exists()) for path in folders]
    fullest = min([*written, Path(tempfile.gettempdir())], key=lambda path: shutil.disk_usage(path).free)
    usage = shutil.disk_usage(fullest)
    return f"the disk of {fullest} is full ({usage.free / 1e6:,.0f} of {usage.total / 1e6:,.0f} MB are free)"
