"""The inventory of a stage: code, packages, defaults and outside files that DVC could not see, in a file that it can.

`outputs/<preset>/inventory/<stage>.json` holds for every stage

* `code`: the digest of the code that the stage's function can reach (flows/recording/code.py);
* `packages`: the digest of the versions in requirements.lock;
* `defaults`: the options of the stage that the preset leaves to the code, which DVC can't see in the preset's file;
* `files`: what lies behind the options that name files outside the project (videos, data sets, meshes, weights).

The stage depends on this file. `dvc repro` and the flows write it anew every time.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.places import Place
from flows.project import option
from flows.recording.code import code_digest, packages_digest
from flows.stages import STAGES, Stage
from svd import storage
from svd.config import Preset
from svd.core.files import write_json

HASHED_BYTES = 256_000_000
Listing = list[list[str | int]]


def take(preset: Preset) -> dict[str, dict[str, Listing]]:
    """Write the inventories of all stages; returns the lists of files by stage and option value.

    Raises UserError for a bucket that is missing or denied, svd.core.retries.Unreachable when S3 doesn't answer.
    """
    return {stage.name: take_stage(stage, preset) for stage in STAGES.values()}


def take_stage(stage: Stage, preset: Preset) -> dict[str, Listing]:
    """Write the inventory of one stage; returns its lists of files by option value."""
    values = sorted(_values(stage, preset)) if stage.external else []
    found = {value: _listing(value) for value in values}
    content = {
        "code": code_digest(stage),
        "packages": packages_digest(),
        "defaults": _defaults(stage, preset),
        "files": {value: listing for value, listing in found.items() if listing},
    }
    path = Place(preset.name, stage.name).inventory
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return found


def take_and_record(preset: Preset) -> None:
    """Do what the stage `inventory` of dvc.yaml does, and write the entry in dvc.lock that `dvc repro` would write."""
    from flows.recording import dvc as versioning

    take(preset)
    versioning.record("inventory", preset.name, versioning.save_outputs("inventory", preset.name), {})


def _defaults(stage: Stage, preset: Preset) -> dict[str, Any]:
    """Return the options of the stage, by dotted path, that have their default because the preset doesn't set them."""
    resolved, given = preset.model_dump(mode="json"), preset.model_dump(mode="json", exclude_unset=True)
    found: dict[str, Any] = {}
    for dotted in stage.options:
        found |= dict(_left_open(dotted, option(resolved, dotted), option(given, dotted)))
    return found


def _left_open(dotted: str, resolved: Any, given: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values that `resolved` has and `given` lacks; items of a list are compared one by one."""
    if given is None and resolved is not None:
        yield dotted, resolved
    elif isinstance(resolved, Mapping) and isinstance(given, Mapping):
        for name, value in resolved.items():
            yield from _left_open(f"{dotted}.{name}", value, given.get(name))
    elif isinstance(resolved, list) and isinstance(given, list):
        for number, (value, said) in enumerate(zip(resolved, given, strict=False)):
            yield from _left_open(f"{dotted}.{number}", value, said)


def _values(stage: Stage, preset: Preset) -> set[str]:
    """Return all texts among the options of a stage; most name no file and get an empty list."""
    values = preset.model_dump(mode="json")
    texts = (text for dotted in stage.options for text in _texts(option(values, dotted)))
    return set(texts) - {preset.name}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _listing(value: str) -> Listing:
    """List what an option names: (path, size, content), sorted; nothing for a text that is no path.

    The content is an object's ETag, a file's SHA-256, or, when more than 256 MB would have to be read, its time in
    nanoseconds. A list of addresses is a file like others: what the addresses serve isn't asked for.
    """
    if storage.is_remote(value):
        if storage.exists(value):
            return [[value, storage.size(value), storage.version(value)]]
        return [[entry.relative, entry.size, entry.version] for entry in storage.list_files(value)]
    path = Path(value).expanduser()
    tops = [path] if os.path.exists(path) else [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = sorted((str(file), file) for top in tops for file in _files(top))
    hashed = sum(file.stat().st_size for _, file in files) <= HASHED_BYTES
    return [[name, file.stat().st_size, _content(file, hashed)] for name, file in files]


def _files(path: Path) -> Iterator[Path]:
    """Yield a file, or the files in a folder that aren't hidden."""
    if path.is_file():
        yield path
    for file in path.rglob("*") if path.is_dir() else ():
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file


def _content(file: Path, hashed: bool) -> str | int:
    try:
        return storage.sha256(file) if hashed else file.stat().st_mtime_ns
    except PermissionError:
        return "unreadable"
