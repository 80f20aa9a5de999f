"""Stage `sources`: the raw videos of a run in one folder.

`train/` and `test/` hold the synthetic worlds with `truth.json`, `ucf101_fixture/` the stand-in for UCF-101, `footage/`
what `sources.paths` names. Local folders and files are copied there, so that a run is reproducible from its cache
alone; when they are larger than `sources.copied_bytes` together, and for addresses (s3:, https:, ytdl:) and lists (CSV,
Parquet, JSONL, text), `footage/sources.jsonl` lists them instead, one JSON object with the key `uri` a line.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import polars
from rich.console import Console
from rich.progress import track

from svd.data.fixture import write_ucf101_fixture
from svd.data.synthetic import write_worlds
from svd.stage import Report, StageContext, UserError, publish

_REMOTE = ("s3://", "http://", "https://", "ytdl:")
_LISTS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
_ADDRESS_COLUMNS = ("uri", "url", "path", "video", "video_path", "video_url", "contentUrl", "file")


def run(context: StageContext) -> Report:
    """Write the synthetic worlds and gather the footage; what is finished is not made again.

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
    copied, listed = gather(config.paths, finished / "footage", config.copied_bytes)
    if config.synthetic is None and not copied + listed:
        raise UserError(f"sources.paths: no file in {', '.join(config.paths)}; put videos there or name another folder")
    metrics |= {"footage_files": copied, "footage_listed": listed}
    summary = f"{metrics.get('train_videos', 0)} train and {metrics.get('test_videos', 0)} test videos, "
    return publish(
        finished, context.output, Report(metrics, f"{summary}{copied} files and {listed} entries of footage")
    )


def gather(patterns: list[str], folder: Path, copied_bytes: int) -> tuple[int, int]:
    """Copy or list the footage behind `patterns` into `folder`; returns the numbers of copied files and list entries.

    Raises UserError that names the pattern when nothing is there, or a list has no column of addresses.
    """
    rows: list[dict[str, Any]] = []
    files: list[tuple[Path, str]] = []
    for pattern in patterns:
        if pattern.startswith(_REMOTE):
            rows += _remote(pattern)
            continue
        for path in _matches(pattern):
            if path.suffix.lower() in _LISTS and path.is_file():
                rows += _list_rows(path)
            else:
                files += _files(path, {name.split("/")[0] for _, name in files})
    small = sum(path.stat().st_size for path, _ in files if path.exists()) <= copied_bytes
    copied = 0
    for path, name in track(files, "footage", console=Console(stderr=True)):
        if small and _copy(path, folder / name):
            copied += 1
        else:
            rows.append({"uri": str(path.absolute())})
    if rows:
        folder.mkdir(parents=True, exist_ok=True)
        lines = sorted(json.dumps(row, sort_keys=True, ensure_ascii=False) for row in rows)
        text = "".join(f"{line}\n" for line in lines)
        (folder / "sources.jsonl").write_text(text, encoding="utf-8", errors="backslashreplace")
    return copied, len(rows)


def _matches(pattern: str) -> list[Path]:
    """What a pattern names on this machine, sorted."""
    path = Path(pattern).expanduser()
    if path.exists():
        return [path]
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not found:
        raise UserError(f"sources.paths: '{pattern}' does not exist; give a folder, file, glob, list or address")
    return found


def _files(path: Path, taken: set[str]) -> Iterator[tuple[Path, str]]:
    """The files at `path` with their names in the output; a folder keeps its name unless another one has it already.

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
    """Copy a file's bytes; False for what is no readable file, so that it is listed and curation reports the reason."""
    try:
        if not source.is_file():  # opening a named pipe would wait for its writer for ever
            return False
        if target.exists() and target.stat().st_size == source.stat().st_size:
            return True
        read = source.open("rb")
    except OSError:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    with read, temporary.open("wb") as write:
        whole = _pour(read, write)
        write.flush()
        os.fsync(write.fileno())
    if whole:
        temporary.replace(target)
    else:
        temporary.unlink()
    return whole


def _pour(read: BinaryIO, write: BinaryIO) -> bool:
    """Copy to the end; False when the source can't be read on. What fails while writing is raised."""
    while True:
        try:
            block = read.read(1 << 20)
        except OSError:
            return False
        if not block:
            return True
        write.write(block)


def _remote(pattern: str) -> list[dict[str, Any]]:
    """An address, or everything below an s3:// prefix."""
    if not pattern.startswith("s3://") or PurePosixPath(pattern).suffix:
        return [{"uri": pattern}]
    from svd import storage

    found = (entry.location for entry in storage.list_files(pattern))
    return [{"uri": uri} for uri in found if PurePosixPath(uri).suffix.lower() != ".json"]


def _list_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a list with local paths made absolute, because the list itself does not stay where it is."""
    if path.suffix.lower() == ".txt":
        rows: list[dict[str, Any]] = [{"uri": line.strip()} for line in path.read_text().splitlines() if line.strip()]
    else:
        rows = _read_table(path).to_dicts()
    for number, row in enumerate(rows, 1):
        column = next((name for name in _ADDRESS_COLUMNS if row.get(name)), None)
        if column is None:
            raise UserError(f"{path}: row {number} has no address; expected one of {', '.join(_ADDRESS_COLUMNS)}")
        if not str(row[column]).startswith(_REMOTE):
            row[column] = str((path.parent / Path(str(row[column])).expanduser()).absolute())
    return rows


def _read_table(path: Path) -> polars.DataFrame:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return polars.read_parquet(path)
        if suffix == ".jsonl":
            return polars.read_ndjson(path)
        return polars.read_csv(path, separator="\t" if suffix == ".tsv" else ",")
    except (polars.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path}: not a readable list: {' '.join(str(error).split())[:200]}") from None
