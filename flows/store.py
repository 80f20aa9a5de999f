"""Results of stages in a store: `s3://bucket/prefix/<preset>/<stage>/`, or the same layout in a shared folder.

A folder there is whole when its `manifest.json` is: it holds the SHA-256 and the size of every file, is removed before
anything changes, and written last; it also names the DVC hash of the folder. Only what differs travels, both ways.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.progress import Progress

from flows.stages import described
from svd import storage
from svd.config import Preset
from svd.stage import UserError

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
CACHE = Path(".cache") / "s3"
Files = dict[str, dict[str, Any]]


def store_root(option: str | None) -> str | None:
    """The store of this run: `option`, else `SVD_STORE`; None: results stay on this machine and in DVC."""
    return option or os.environ.get("SVD_STORE") or None


def _describe(folder: Path) -> Files:
    """SHA-256 and size of each file by its relative path."""
    return {
        entry.relative: {"sha256": storage.sha256(Path(entry.location)), "size": entry.size}
        for entry in storage.list_files(folder)
    }


def _read_manifest(uri: str) -> dict[str, Any]:
    """The manifest at `uri`; an empty one when nothing whole is there."""
    location = storage.join(uri, MANIFEST)
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(location))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{location}: not a manifest; delete the folder and publish the stage again") from None
    return content


def read_manifest(uri: str) -> Files | None:
    """What is stored at `uri`; None when nothing whole is there."""
    return _read_manifest(uri).get("files")


def stored_version(uri: str) -> str | None:
    """The version (DVC hash) that was published at `uri`; None when nothing whole is there, or it has none."""
    return _read_manifest(uri).get("version")


def publish(folder: Path, uri: str, version: str | None = None) -> int:
    """Make `uri` hold exactly the files of `folder`, named `version`; returns the bytes that were sent.

    A kill leaves a folder without manifest, which no reader takes; publishing again goes on with what is missing.
    """
    wanted, old = _describe(folder), _read_manifest(uri)
    manifest: dict[str, Any] = {"files": wanted, "version": version}
    if old == manifest:
        return 0
    stored = old.get("files") or {}
    present = {entry.relative: entry for entry in storage.list_files(uri)}
    storage.delete(storage.join(uri, MANIFEST))
    sent = 0
    for relative, about in _with_progress(wanted, f"to {uri}"):
        known = relative in present and stored.get(relative) == about
        if not (known or _same_object(present.get(relative), about)):
            storage.upload(folder / relative, storage.join(uri, relative))
            sent += about["size"]
    for relative in present.keys() - wanted.keys() - {MANIFEST}:
        storage.delete(present[relative].location)
    storage.write_bytes(storage.join(uri, MANIFEST), json.dumps(manifest, indent=1, sort_keys=True).encode())
    return sent


def _same_object(entry: storage.Entry | None, about: Mapping[str, Any]) -> bool:
    """Whether an object of an interrupted `publish` is the wanted one: equal size, and the checksum it was put with."""
    return (
        entry is not None and entry.size == about["size"] and storage.stored_sha256(entry.location) == about["sha256"]
    )


def fetch(uri: str, folder: Path) -> int:
    """Bring `folder` to exactly what is stored at `uri`, in one rename; returns the bytes that were fetched.

    A fetch that was interrupted goes on. Raises UserError when nothing whole is stored there, svd.storage.Truncated
    when a file isn't what the manifest says.
    """
    files = read_manifest(uri)
    if files is None:
        raise UserError(f"{uri}: nothing whole is stored there ({MANIFEST} is missing); run the stage that makes it")
    if folder.is_dir() and _describe(folder) == files:
        return 0
    staging = folder.with_name(f".{folder.name}.fetching")
    fetched = 0
    for relative, about in _with_progress(files, f"from {uri}"):
        target = staging / relative
        if _matches(target, about):
            continue
        if _matches(folder / relative, about):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / relative, target)
            continue
        storage.download(storage.join(uri, relative), target)
        if not _matches(target, about):
            target.unlink()
            raise storage.Truncated(
                f"{storage.join(uri, relative)}: not the file of {MANIFEST}; publish the stage again"
            )
        fetched += about["size"]
    staging.mkdir(parents=True, exist_ok=True)
    for entry in list(storage.list_files(staging)):
        if entry.relative not in files:
            Path(entry.location).unlink()
    _swap(staging, folder)
    return fetched


def _matches(path: Path, about: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == about["size"] and storage.sha256(path) == about["sha256"]


def _swap(staging: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _with_progress(files: Files, title: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with Progress(transient=True) as progress:
        task = progress.add_task(title, total=sum(about["size"] for about in files.values()))
        for relative, about in files.items():
            yield relative, about
            progress.advance(task, about["size"])


def fetch_inputs(root: str, preset: str, folders: Mapping[str, Path]) -> None:
    """Bring the folders of input stages from the store; one that is not stored there is left as it is here."""
    for stage, folder in folders.items():
        uri = storage.join(root, preset, stage)
        if read_manifest(uri) is None:
            logger.info("%s is not in the store, the local folder is used", uri)
        elif moved := fetch(uri, folder):
            logger.info("%s: %.1f MB fetched", uri, moved / 1e6)


def _sections(stage: str) -> list[str]:
    """The parts of a preset that a stage depends on, as dvc.yaml lists them."""
    return [key for group in described(stage).get("params", []) for keys in group.values() for key in keys]


def localise(preset: Preset, stage: str) -> Preset:
    """The preset with the `s3://` paths that `stage` reads replaced by local copies, so that every path may be remote.

    Addresses of sources stay: curation reads those one at a time.
    """
    values = preset.model_dump(mode="json")
    for section in _sections(stage):
        *parents, last = section.split(".")
        place = values
        for name in parents:
            place = place[name]
        if section != "sources":
            place[last] = _local_copies(place[last])
    return Preset.model_validate(values)


def _local_copies(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _local_copies(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_local_copies(item) for item in value]
    return str(local_copy(value)) if isinstance(value, str) and storage.is_remote(value) else value


def local_copy(uri: str) -> Path:
    """The file or folder at `uri` under .cache/s3, brought there when it is missing or has another size.

    Raises UserError when there is neither an object nor a prefix of that name.
    """
    bucket, key = storage.split_uri(uri)
    target = CACHE / bucket / key
    if storage.exists(uri):
        if not (target.is_file() and target.stat().st_size == storage.size(uri)):
            storage.download(uri, target)
        return target
    if not any(True for _ in storage.list_files(uri)):
        raise UserError(f"{uri}: no such object or folder; correct the preset or put it there")
    storage.download_tree(uri, target)
    return target
