"""Providing a local file for any kind of source, for as long as it is needed.

Kinds of sources and their listing: svd/sources/listing.py. `ytdl:` addresses need yt-dlp.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from svd import storage
from svd.core.errors import UserError
from svd.sources.listing import YTDL
from svd.sources.source import Source
from svd.sources.tars import header_hash

MAX_BYTES = 100 << 30
MAX_SECONDS = 6 * 3600.0
_BLOCK = 4 << 20
_SILENT = logging.getLogger(f"{__name__}.yt_dlp")  # it would print addresses; what fails is raised as well
_SILENT.setLevel(logging.CRITICAL)


@contextlib.contextmanager
def local_file(source: Source, folder: Path) -> Iterator[Path]:
    """Yield a local file with the bytes of `source`; a fetched or extracted file lies in `folder` and is removed.

    Raises OSError when it can't be read or fetched, UserError when a tool for its kind of address is missing.
    """
    if source.path is not None and source.offset is None:
        yield source.path
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as temporary:
        # The file is never named after the address, which may hold `../` or be too long.
        target = Path(temporary) / "source"
        if source.archive is not None:
            _extract(source, target)
        else:
            _fetch(str(source.origin), target)
        yield target


def _extract(source: Source, target: Path) -> None:
    """Copy a member of a tar to `target`; of a remote tar only the bytes of the member are read."""
    archive = source.path or source.archive or ""
    left = source.size or 0
    with storage.open_read(source.origin, _BLOCK) as stream, target.open("wb") as file:
        if source.header and header_hash(stream, source.offset or 0) != source.header:
            raise OSError(f"{archive}: it is another tar than the one that was listed; list the sources again")
        stream.seek(source.offset or 0)
        while block := stream.read(min(left, _BLOCK)):
            file.write(block)
            left -= len(block)
    if left:
        raise OSError(f"{archive}: {left} bytes less than its index says; the tar was cut short")


def _fetch(uri: str, target: Path) -> None:
    """Download a remote source to `target`, limited in bytes and time."""
    if not uri.startswith(YTDL):
        # An endless stream must not fill the disk.
        storage.download(uri, target, min(MAX_BYTES, shutil.disk_usage(target.parent).free / 2), MAX_SECONDS)
        return
    try:
        import yt_dlp
    except ModuleNotFoundError:
        raise UserError(
            f"sources: '{uri}' needs yt-dlp: pip install 'svd-platform[youtube]', or remove the source"
        ) from None
    options = {
        **{"outtmpl": str(target).replace("%", "%%"), "format": "bv*[height<=1080]/b", "max_filesize": MAX_BYTES},
        **{"logger": _SILENT, "quiet": True, "noprogress": True, "no_warnings": True, "noplaylist": True},
    }
    try:
        with yt_dlp.YoutubeDL(options) as downloader:
            downloader.download([uri.removeprefix(YTDL)])
    except yt_dlp.utils.DownloadError as error:
        raise OSError(f"yt-dlp: {error}") from None
