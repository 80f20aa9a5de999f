"""What a preset names outside the project (videos, data sets, meshes, weights), listed so that DVC sees it change.

DVC can't depend on paths that stand in a preset. So `outputs/<preset>/inventory/<stage>.json` lists what lies behind
the options of a stage, and the stage depends on this file. `dvc repro` and the flows write it anew every time.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.stages import EXTERNAL, OUTPUTS, preset_sections
from svd import storage
from svd.config import Preset
from svd.core.files import write_json

HASHED_BYTES = 256_000_000
Listing = list[list[str | int]]


def take(preset: Preset) -> dict[str, dict[str, Listing]]:
    """Write the lists of all stages; returns them by stage and option value.

    Raises UserError for a bucket that is missing or denied, svd.core.retries.Unreachable when S3 doesn't answer.
    """
    found = {stage: {value: _listing(value) for value in sorted(_values(preset, stage))} for stage in EXTERNAL}
    folder = OUTPUTS / preset.name / "inventory"
    folder.mkdir(parents=True, exist_ok=True)
    for stage, lists in found.items():
        write_json(folder / f"{stage}.json", {value: listing for value, listing in lists.items() if listing})
    return found


def take_and_record(preset: Preset) -> None:
    """The inventory as the stage of dvc.yaml, with the entry in dvc.lock that `dvc repro` would write."""
    from flows.recording import dvc as versioning

    take(preset)
    versioning.record("inventory", preset.name, versioning.save_outputs("inventory", preset.name), {})


def _values(preset: Preset, stage: str) -> set[str]:
    """All texts among the options of a stage; most name no file and get an empty list."""
    values = preset.model_dump(mode="json")
    found: set[str] = set()
    for section in preset_sections(stage):
        part: Any = values
        for name in section.split("."):
            part = part[name]
        found |= set(_texts(part))
    return found - {preset.name}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _listing(value: str) -> Listing:
    """What an option names: (path, size, content), sorted; nothing for a text that is no path.

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
    """A file, or the files in a folder that aren't hidden."""
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
