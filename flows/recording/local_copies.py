"""Local copies of what a preset names in `s3://`: every path option may be remote, stages read files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.stages import Stage
from svd import storage
from svd.config import Preset
from svd.core.errors import UserError
from svd.core.files import exclusive

CACHE = Path(".cache") / "s3"
VERSIONS = Path(".cache") / "s3-versions"


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
