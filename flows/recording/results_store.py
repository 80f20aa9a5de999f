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

from flows.places import Place
from flows.rendering.dvc_yaml import BRANCH, MAIN
from flows.stages import Stage
from svd import storage
from svd.config import Preset
from svd.core.errors import UserError
from svd.core.files import exclusive, recover, replace_folder
from svd.core.retries import Transient, Unreachable, retrying

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
LOCKS = (MAIN.with_suffix(".lock"), BRANCH.with_suffix(".lock"))
PUBLISH_ATTEMPTS = 4
CACHE = Path(".cache") / "s3"
VERSIONS = Path(".cache") / "s3-versions"
Files = dict[str, dict[str, Any]]


def store_root(option: str | None) -> str | None:
    """Return the store of this run: `option`, else `SVD_STORE`; None: results stay on this machine and in DVC."""
    return option or os.environ.get("SVD_STORE") or None


def _describe(folder: Path) -> Files:
    """Return SHA-256 and size of each file by its relative path."""
    return {
        entry.relative: {"sha256": storage.sha256(Path(entry.location)), "size": entry.size}
        for entry in storage.list_files(folder)
    }


def _read_manifest(uri: str) -> dict[str, Any]:
    """Return the manifest at `uri`; an empty one when nothing whole is there."""
    location = storage.join(uri, MANIFEST)
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(location))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{location}: not a manifest; delete the folder and publish the stage again") from None
    return content


def read_manifest(uri: str) -> Files | None:
    """Return the files stored at `uri`; None when nothing whole is there."""
    return _read_manifest(uri).get("files")


def stored_version(uri: str) -> str | None:
    """Return the version (DVC hash) that was published at `uri`; None when nothing whole is there, or it has none."""
    return _read_manifest(uri).get("version")


def publish_folder(folder: Path, uri: str, version: str | None = None) -> int:
    """Make `uri` hold exactly the files of `folder`, named `version`; return the bytes that were sent.

    A kill leaves a folder without manifest, which no reader takes; publishing again goes on with what is missing. Two
    runs that publish there at once can mix their files, so what is stored is looked at again at the end. Raises
    svd.core.retries.Unreachable when another run keeps changing it.
    """
    manifest: dict[str, Any] = {"files": _describe(folder), "version": version}
    wanted, sent = manifest["files"], 0
    for _ in range(PUBLISH_ATTEMPTS):
        if _read_manifest(uri) != manifest:
            sent += _send(folder, uri, manifest)
        elif not sent:
            return 0
        stored = {entry.relative: entry for entry in storage.list_files(uri)}
        if _read_manifest(uri) == manifest and all(_same_object(stored.get(name), wanted[name]) for name in wanted):
            return sent
        storage.delete(storage.join(uri, MANIFEST))
    raise Unreachable(f"{uri}: another run publishes there at the same time; let one of them finish first")


def _send(folder: Path, uri: str, manifest: dict[str, Any]) -> int:
    """Do one pass of `publish_folder`: withdraw the manifest, send what differs, write the manifest."""
    wanted, stored = manifest["files"], _read_manifest(uri).get("files") or {}
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
    """Return whether an object of an interrupted `publish_folder` is the wanted one, by size and checksum."""
    return (
        entry is not None and entry.size == about["size"] and storage.stored_sha256(entry.location) == about["sha256"]
    )


def fetch_folder(uri: str, folder: Path) -> int:
    """Bring `folder` to exactly what is stored at `uri`, in one rename; return the bytes that were fetched.

    A fetch that was interrupted goes on; of several processes that want the folder one fetches. What is published anew
    meanwhile is fetched again. Raises UserError when nothing whole is stored there, svd.storage.Truncated when a file
    isn't what the manifest says.
    """
    if read_manifest(uri) is None:
        raise UserError(f"{uri}: nothing whole is stored there ({MANIFEST} is missing); run the stage that makes it")
    recover(folder)
    with exclusive(folder.with_name(f".{folder.name}.fetching.lock")):
        return retrying(lambda: _fetch(uri, folder), uri)


def _fetch(uri: str, folder: Path) -> int:
    files = read_manifest(uri)
    if files is None:
        raise Transient("is being published anew")
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
        _fetch_file(uri, relative, target, files)
        fetched += about["size"]
    staging.mkdir(parents=True, exist_ok=True)
    for entry in list(storage.list_files(staging)):
        if entry.relative not in files:
            Path(entry.location).unlink()
    replace_folder(staging, folder)
    return fetched


def _fetch_file(uri: str, relative: str, target: Path, files: Files) -> None:
    """Fetch one file; raises Transient when it isn't the manifest's because another one is or was being published."""
    location = storage.join(uri, relative)
    try:
        storage.download(location, target)
        if _matches(target, files[relative]):
            return
        target.unlink()
    except FileNotFoundError:
        pass
    if read_manifest(uri) != files:
        raise Transient("is being published anew")
    raise storage.Truncated(f"{location}: not the file of {MANIFEST}; publish the stage again")


def _matches(path: Path, about: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == about["size"] and storage.sha256(path) == about["sha256"]


def _with_progress(files: Files, title: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with Progress(transient=True) as progress:
        task = progress.add_task(title, total=sum(about["size"] for about in files.values()))
        for relative, about in files.items():
            yield relative, about
            progress.advance(task, about["size"])


def fetch_inputs(root: str, preset: str, folders: Mapping[str, Path]) -> None:
    """Bring the folders of input stages from the store; one that is not stored there stays as it is here."""
    for stage, folder in folders.items():
        uri = Place(preset, stage).uri(root)
        if read_manifest(uri) is None:
            logger.info("%s is not in the store, the local folder is used", uri)
        elif moved := fetch_folder(uri, folder):
            logger.info("%s: %.1f MB fetched", uri, moved / 1e6)


def fetch_locks(root: str, preset: str) -> None:
    """Take over DVC's lock files that the last pipeline kept in the store, where there are none (a fresh pod)."""
    if any(lock.exists() for lock in LOCKS):
        return
    for lock in LOCKS:
        stored = storage.join(root, preset, lock.as_posix())
        if storage.exists(stored):
            storage.download(stored, lock)


def keep_locks(root: str, preset: str) -> None:
    """Keep DVC's lock files in the store, so that the next pipeline knows what is unchanged, on whatever machine."""
    for lock in LOCKS:
        if lock.exists():
            storage.upload(lock, storage.join(root, preset, lock.as_posix()))


def localise(preset: Preset, stage: Stage) -> Preset:
    """Return the preset with the `s3://` paths that `stage` reads replaced by local copies: every path may be remote.

    Addresses of sources stay: curation reads those one at a time.
    """
    values = preset.model_dump(mode="json")
    for section in stage.options:
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
    """Return the copy of `uri` under .cache/s3; it is fetched when it is missing or another version is stored.

    Raises UserError when there is neither an object nor a prefix of that name.
    """
    bucket, key = storage.split_uri(uri)
    target = CACHE / bucket / key
    if storage.exists(uri):
        _bring(uri, storage.version(uri), target)
        return target
    entries = list(storage.list_files(uri))
    if not entries:
        raise UserError(f"{uri}: no such object or folder; correct the preset or put it there")
    for entry in entries:
        _bring(entry.location, entry.version, target / entry.relative)
    return target


def _bring(uri: str, version: str, target: Path) -> None:
    """Download an object unless `target` is this version of it, which is noted under .cache/s3-versions."""
    note = VERSIONS / target.relative_to(CACHE)
    with exclusive(note.with_name(f".{note.name}.lock")):
        if target.is_file() and note.is_file() and note.read_text() == version:
            return
        note.unlink(missing_ok=True)
        storage.download(uri, target)
        note.write_text(version)
