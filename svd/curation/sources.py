"""Sources: where raw videos come from, as one list of `Source` whatever the input is.

Understood: folders, globs and single files; `s3://` and `gs://`-like prefixes and http(s) addresses through
svd/storage.py; lists (CSV, Parquet, JSONL, or text with one address a line) with columns uri, caption, licence and any
others, which are carried through as metadata; WebDataset tars (`<key>.mp4` with `<key>.txt` or `<key>.json`); and
`ytdl:<address>` through yt-dlp when it is installed. A file `<name>.json` beside `<name>.mp4` is its sidecar.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import itertools
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from svd import storage
from svd.data.shards import read_range
from svd.stage import UserError

MAX_BYTES = 100 << 30
MAX_SECONDS = 6 * 3600.0
REMOTE = ("s3://", "http://", "https://", "ytdl:")
LISTS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
# Everything else that lies in a folder of videos is taken for a video, so that a broken one gets its row.
NOT_VIDEOS = {
    *(".json", ".jsonl", ".txt", ".md", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".xml", ".html", ".srt", ".vtt"),
    *(".ass", ".nfo", ".sha256", ".md5", ".log", ".py", ".dvc", ".pdf", ".zip", ".gz", ".lock", ".part", ".tmp"),
    *(".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npz", ".npy", ".wav", ".flac"),
}
VIDEOS = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv"),
    *(".ogv", ".3gp", ".mxf"),
}
URI_NAMES = ("uri", "url", "path", "video", "video_path", "video_url", "contentUrl", "file")
CAPTION_NAMES = ("caption", "text", "description", "name", "title")
LICENCE_NAMES = ("licence", "license")


@dataclass(frozen=True)
class SceneCaption:
    """A caption that came with a source: of the whole of it, or of [start, end) seconds."""

    text: str
    start: float = 0.0
    end: float = float("inf")


@dataclass(frozen=True)
class Source:
    """One raw video. `uri` names it in the catalogue; `path` is where it lies when it is local.

    offset, size: place of the video inside the tar at `path`, when it comes from one.
    """

    uri: str
    path: Path | None = None
    split: str = ""
    captions: tuple[SceneCaption, ...] = ()
    licence: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    offset: int | None = None
    size: int | None = None

    @property
    def remote(self) -> bool:
        """True when the bytes must be fetched first."""
        return self.path is None


def list_sources(patterns: Iterable[str], root: Path | None = None) -> list[Source]:
    """All sources behind `patterns`, sorted by uri, each once.

    root: local files below it get uris relative to it, and their first folder as `split`.
    Raises UserError that names the pattern when a path does not exist or a list can't be read.
    """
    found = {}
    for source in itertools.chain.from_iterable(_expand(pattern, root) for pattern in patterns):
        uri = printable(source.uri)
        found[uri] = replace(source, uri=uri)
    return [found[uri] for uri in sorted(found)]


def printable(text: str) -> str:
    """`text` as it can be stored: what is no Unicode (a file name in another encoding, a lone surrogate) as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _expand(pattern: str, root: Path | None) -> Iterator[Source]:
    if pattern.startswith(REMOTE):
        yield from _expand_remote(pattern)
        return
    path = Path(pattern).expanduser()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if not p.is_dir()):
            if not any(part.startswith(".") for part in file.relative_to(path).parts):
                yield from _local(file, root, listed=False)
    elif path.is_file():
        yield from _local(path, root, listed=True)
    elif glob.has_magic(pattern):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise UserError(f"sources: nothing matches '{pattern}'; check the pattern")
        for match in matches:
            yield from _expand(glob.escape(match) if not Path(match).exists() else match, root)
    else:
        raise UserError(f"sources: '{pattern}' does not exist; give a folder, file, glob, list or address")


def _expand_remote(pattern: str) -> Iterator[Source]:
    suffix = PurePosixPath(pattern.split("?")[0]).suffix.lower()
    if suffix == ".tar":
        raise UserError(f"sources: '{pattern}': download tars first, they are read from local files")
    if suffix in LISTS:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"list{suffix}"
            _fetch_list(pattern, file)
            yield from _list_file(file, None)
    elif not pattern.startswith("s3://") or suffix in VIDEOS:
        yield Source(pattern)
    else:
        for entry in storage.list_files(pattern):
            if PurePosixPath(entry.location).suffix.lower() not in NOT_VIDEOS:
                yield Source(entry.location)


def _fetch_list(uri: str, file: Path) -> None:
    try:
        storage.download(uri, file)
    except OSError as error:
        raise UserError(f"sources: the list '{uri}' can't be fetched: {error}") from None


def _local(file: Path, root: Path | None, listed: bool) -> Iterator[Source]:
    """The sources in one local file; `listed`: the user named this very file, so a list is read as a list."""
    suffix = file.suffix.lower()
    if suffix == ".tar":
        yield from _tar(file, root)
    elif suffix in LISTS and (listed or suffix in (".csv", ".jsonl", ".parquet")):
        yield from _list_file(file, root)
    elif suffix not in NOT_VIDEOS:
        uri, split = _name(file, root)
        yield with_sidecar(Source(uri, file, split), _read_sidecar(file.with_suffix(".json")))


def _name(file: Path, root: Path | None) -> tuple[str, str]:
    if root is not None and file.is_relative_to(root):
        relative = file.relative_to(root)
        return relative.as_posix(), relative.parts[0] if len(relative.parts) > 1 else ""
    return str(file), ""


def _read_sidecar(path: Path) -> dict[str, Any]:
    """The sidecar's object; a missing one is empty, and so is one that isn't a JSON object (kept as a note)."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return {"sidecar_error": f"{path.name}: {error}"}
    return values if isinstance(values, dict) else {"sidecar_error": f"{path.name}: not a JSON object"}


def with_sidecar(source: Source, values: Mapping[str, Any]) -> Source:
    """`source` with the captions (`caption`; `scenes`: start_seconds, end_seconds, caption), licence and metadata."""
    values = dict(values)
    captions = [SceneCaption(printable(str(text)))] if (text := _take(values, CAPTION_NAMES)) else []
    scenes = values.pop("scenes", [])
    for scene in scenes if isinstance(scenes, list) else []:
        if isinstance(scene, dict) and (text := scene.get("caption")):
            captions.append(SceneCaption(printable(str(text)), *(_seconds(scene, side) for side in ("start", "end"))))
    licence = _take(values, LICENCE_NAMES)
    return replace(
        source,
        captions=(*source.captions, *captions),
        licence=printable(str(licence)) if licence else source.licence,
        metadata={**source.metadata, **{k: v for k, v in values.items() if v is not None}},
    )


def _seconds(scene: Mapping[str, Any], side: str) -> float:
    value = scene.get(f"{side}_seconds", scene.get(side))
    return float(value) if isinstance(value, int | float) else (0.0 if side == "start" else float("inf"))


def _take(values: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Remove and return the first of `names` that has a value."""
    for name in names:
        if values.get(name):
            return values.pop(name)
    return None


def _list_file(file: Path, root: Path | None) -> Iterator[Source]:
    # A listed source belongs to the split whose folder holds the list.
    _, split = _name(file, root)
    for number, row in enumerate(_rows(file), start=1):
        row = dict(row)
        uri = _take(row, URI_NAMES)
        if not uri:
            raise UserError(f"{file}: row {number} has no address; expected one of the columns {', '.join(URI_NAMES)}")
        uri = str(uri)
        if uri.startswith(REMOTE):
            source = Source(uri, split=split)
        else:
            path = Path(uri).expanduser()
            path = path if path.is_absolute() else file.parent / path
            name, own = _name(path, root)
            source = Source(name if root is not None else uri, path, own or split)
        yield with_sidecar(source, row)


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            for batch in pq.ParquetFile(file).iter_batches(4096):
                yield from batch.to_pylist()
        elif suffix in (".csv", ".tsv"):
            with file.open(newline="", encoding="utf-8-sig") as stream:
                yield from csv.DictReader(stream, delimiter="\t" if suffix == ".tsv" else ",")
        else:
            with file.open(encoding="utf-8") as stream:
                for line in filter(None, map(str.strip, stream)):
                    yield json.loads(line) if suffix == ".jsonl" else {"uri": line}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read as a list of sources: {' '.join(str(error).split())}") from None


def _tar(file: Path, root: Path | None) -> Iterator[Source]:
    """Videos of a WebDataset tar, addressed by offset; text and JSON members of the same key describe them."""
    name, split = _name(file, root)
    videos: dict[str, Source] = {}
    facts: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for info in tar:
                key, suffix = str(PurePosixPath(info.name).with_suffix("")), PurePosixPath(info.name).suffix.lower()
                if not info.isfile():
                    continue
                if suffix in VIDEOS:
                    videos[key] = Source(f"{name}#{info.name}", file, split, offset=info.offset_data, size=info.size)
                elif suffix in (".txt", ".json") and (content := tar.extractfile(info)):
                    text = content.read().decode("utf-8", "replace")
                    facts.setdefault(key, {}).update({"caption": text.strip()} if suffix == ".txt" else _object(text))
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{file}: not a readable tar: {error}") from None
    for key, source in videos.items():
        yield with_sidecar(source, facts.get(key, {}))


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        return {"sidecar_error": str(error)}
    return values if isinstance(values, dict) else {}


@contextlib.contextmanager
def local_file(source: Source, folder: Path) -> Iterator[Path]:
    """A local file with the bytes of `source`; a fetched or extracted one lies in `folder` and is removed afterwards.

    Raises OSError when it can't be read or fetched, UserError when a tool for its kind of address is missing.
    """
    if source.path is not None and source.offset is None:
        yield source.path
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as temporary:
        # The name in the address is never used as a name on disk: it may hold `../` or be too long.
        target = Path(temporary) / "source"
        if source.path is not None:
            target.write_bytes(read_range(source.path, source.offset or 0, source.size or 0))
        else:
            _fetch(source.uri, target)
        yield target


def _fetch(uri: str, target: Path) -> None:
    if not uri.startswith("ytdl:"):
        # A stream that never ends must not fill the disk.
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
        **{"quiet": True, "noprogress": True, "no_warnings": True, "noplaylist": True},
    }
    try:
        with yt_dlp.YoutubeDL(options) as downloader:
            downloader.download([uri.removeprefix("ytdl:")])
    except yt_dlp.utils.DownloadError as error:
        raise OSError(f"yt-dlp: {error}") from None
