"""Stage `sources`: the raw videos of a run in one folder.

`train/` and `test/` hold the synthetic worlds with `truth.json`, `ucf101_fixture/` the stand-in for UCF-101, `footage/`
what `sources.paths` names. Local folders and files are copied there, so that a run is reproducible from its cache
alone. When they are larger than `sources.copied_bytes` together, and for addresses (s3:, https:, ytdl:) and lists,
`footage/sources.jsonl` holds what svd/sources/listing.py finds there instead: one JSON object per video, or per span of
one that a list names, with `uri`, captions, licence, other columns, and for a member of a tar its place. Credentials of
addresses are left out; whoever fetches looks them up in the user's list (`with_addresses`).
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import track

from svd import storage
from svd.core.errors import UserError
from svd.core.files import atomic_file
from svd.sources.kinds import LISTS_IN_FOLDERS, NOT_VIDEOS
from svd.sources.listing import list_sources, must_be_fetched
from svd.sources.rows import LISTS
from svd.sources.source import Source, as_rows
from svd.stage import Report, StageContext, publish
from svd.synthetic.ucf101_fixture import write_ucf101_fixture
from svd.synthetic.videos import write_worlds


def run(context: StageContext) -> Report:
    """Write the synthetic worlds and gather_footage the footage; what is finished is not made again.

    Raises UserError when the preset names no source, a path does not exist, or nothing is found.
    """
    config, finished = context.preset.sources, context.work / "finished"
    finished.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float | int | str] = {}
    if config.synthetic is not None:
        for split, frames in write_worlds(finished, config.synthetic, context.preset.seed).items():
            metrics[f"{split}_frames"] = frames
        metrics["train_videos"] = config.synthetic.train_videos
        metrics["test_videos"] = config.synthetic.test_videos
        fixture = finished / "ucf101_fixture"
        metrics["ucf101_fixture_clips"] = write_ucf101_fixture(fixture, config.synthetic, context.preset.seed)
    elif not config.paths:
        raise UserError(
            f"preset '{context.preset.name}': set sources.paths or sources.synthetic, there is nothing to read"
        )
    copied, listed = gather_footage(config.paths, finished / "footage", config.copied_bytes)
    if config.synthetic is None and not copied + listed:
        raise UserError(f"sources.paths: no file in {', '.join(config.paths)}; put videos there or name another folder")
    metrics |= {"footage_files": copied, "footage_listed": listed}
    summary = f"{metrics.get('train_videos', 0)} train and {metrics.get('test_videos', 0)} test videos, "
    return publish(
        finished, context.output, Report(metrics, f"{summary}{copied} files and {listed} entries of footage")
    )


def gather_footage(patterns: list[str], folder: Path, copied_bytes: int) -> tuple[int, int]:
    """Copy or list the footage behind `patterns` into `folder`; return the numbers of copied files and list entries.

    Raises UserError that names the pattern when nothing is there, or a list has no column of addresses.
    """
    listed = [pattern for pattern in patterns if must_be_fetched(pattern)]
    files: list[tuple[Path, str]] = []
    tops: list[str] = []
    for path in (path for pattern in patterns if pattern not in listed for path in _matches(pattern)):
        if _to_be_listed(path):
            listed.append(str(path))
        else:
            tops.append(str(path))
            files += _files(path, {name.split("/")[0] for _, name in files})
    if sum(path.stat().st_size for path, _ in files if path.exists()) > copied_bytes:
        listed, files = listed + tops, []
    bar = track(files, "footage", console=Console(stderr=True), disable=not files)
    unread = [path for path, name in bar if not _copy(path, folder / name)]
    broken = [Source(str(path), path) for path in unread if path.suffix.lower() not in NOT_VIDEOS]
    sources = [*list_sources(listed), *broken]
    _write_list(sources, folder)
    return len(files) - len(unread), len(sources)


def _write_list(sources: list[Source], folder: Path) -> None:
    if not sources:
        return
    rows = (row for source in sources for row in as_rows(source))
    lines = sorted(json.dumps(row, sort_keys=True, ensure_ascii=False) for row in rows)
    text = "".join(f"{line}\n" for line in lines)
    with atomic_file(folder / "sources.jsonl") as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _matches(pattern: str) -> list[Path]:
    """Return the paths that a pattern names on this machine, absolute, sorted; raises UserError when there is none."""
    path = storage.local_path(pattern).expanduser().absolute()
    found = [path] if os.path.lexists(path) else sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not found:
        list_sources([pattern])  # says what is wrong with it
    return found


def _to_be_listed(path: Path) -> bool:
    """Whether `path` is a list, or a folder with a list that a copy would break or give away.

    Raises UserError for a list that can't be read.
    """
    if not path.is_dir():
        return path.suffix.lower() in LISTS
    inside = os.path.normpath(path) + os.sep
    lists = [str(file) for file, _ in _files(path, set()) if file.suffix.lower() in LISTS_IN_FOLDERS]
    return any(_not_to_be_copied(source, inside) for source in list_sources(lists))


def _not_to_be_copied(source: Source, inside: str) -> bool:
    """Whether a list that names `source` stays where it is: for what lies elsewhere, or credentials in the list."""
    return source.private or (source.path is not None and not os.path.normpath(source.path).startswith(inside))


def _files(path: Path, taken: set[str]) -> Iterator[tuple[Path, str]]:
    """Yield the files at `path` with their names in the output; a folder keeps its name unless that is taken.

    Bytes of a name that are no Unicode become escapes, because DVC can't store them.
    """
    if not path.is_dir():
        yield path, _free(_printable(path.name), taken)
        return
    top = _free(_printable(path.resolve().name), taken)
    for file in sorted(p for p in path.rglob("*") if not p.is_dir()):
        relative = file.relative_to(path)
        if not any(part.startswith(".") for part in relative.parts):
            yield file, f"{top}/{_printable(relative.as_posix())}"


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _free(name: str, taken: set[str]) -> str:
    candidates = (name, *(f"{Path(name).stem}-{number}{Path(name).suffix}" for number in range(2, len(taken) + 3)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _copy(source: Path, target: Path) -> bool:
    """Copy a file's bytes; return False for what can't be read, which is listed so that curation reports the reason."""
    try:
        if not source.is_file():  # opening a named pipe would wait for its writer for ever
            return False
        if target.exists() and target.stat().st_size == source.stat().st_size:
            return True
        read = source.open("rb")
    except OSError:
        return False
    try:
        with read, atomic_file(target) as temporary, temporary.open("wb") as write:
            _pour(read, write)
    except _Unreadable:
        return False
    return True


class _Unreadable(Exception):
    """A source that breaks off while it is read."""


def _pour(read: BinaryIO, write: BinaryIO) -> None:
    """Copy to the end; raises _Unreadable for what fails while reading, and OSError while writing."""
    while True:
        try:
            block = read.read(1 << 20)
        except OSError as error:
            raise _Unreadable from error
        if not block:
            return
        write.write(block)
