"""The inputs of a stage's run: folders on this machine, brought from the store by their hashes, whole or in part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dvc.ui import ui

from flows.places import Place
from flows.recording import dvc as versioning
from flows.recording import results_store
from flows.stages import OPTIONAL_INPUTS, Stage
from flows.tracking.runs import Lineage
from svd import storage
from svd.config import Preset
from svd.core.errors import UserError
from svd.core.files import atomic_folder, write_json
from svd.stage import STREAMED

PARTS = Path(".cache") / "parts"


@dataclass(frozen=True)
class Part:
    """Those files of an input that a stage reads, in a folder of their own, and the hash of the whole input."""

    folder: Path
    whole: Lineage


def stage_inputs(stage: Stage, preset: Preset, parts: Mapping[str, Part]) -> dict[str, Path]:
    """Return the folder of each input; raises UserError that names a missing one and the command that makes it."""
    folders = Place(preset.name, stage.name).inputs | {name: part.folder for name, part in parts.items()}
    missing = [name for name, path in folders.items() if not path.is_dir()]
    if stage.name in OPTIONAL_INPUTS:
        return {name: path for name, path in folders.items() if name not in missing}
    if missing:
        raise UserError(
            f"stage '{stage.name}' needs {folders[missing[0]]}, which is not there; "
            f"run `svd stage {missing[0]} --preset {preset.name}` or `dvc repro`"
        )
    return folders


def input_hashes(folders: Mapping[str, Path], parts: Mapping[str, Part]) -> list[Lineage]:
    """Return the DVC hash of each input that is there: as the store has it for one in part, else as it is now."""
    return [
        parts[name].whole if name in parts else versioning.hash_folder(path)
        for name, path in folders.items()
        if name in parts or path.is_dir()
    ]


def input_files(folder: Path) -> dict[str, int]:
    """Return the files of an input by relative path with their sizes in bytes; those that are streamed have 0."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if files.pop(STREAMED, None):
        files |= dict.fromkeys(json.loads((folder / STREAMED).read_text()), 0)
    return files


def bring_inputs(
    stage: Stage, preset: str, items: Sequence[Lineage], root: str | None, stream: bool = False
) -> dict[str, Part]:
    """Bring a stage's inputs to the hashes `items` (default: those that the store names); return what came in part.

    An input of which the stage reads only some files is brought in part when there is a store and no folder of it here.
    stream: leave in the store what the stage can read there.
    """
    if root is None:
        versioning.pull(list(items))
        return {}
    if not items:
        items = results_store.stored_outputs(root, preset, Place(preset, stage.name).inputs)
    partly = [i for i in items if _in_part(stage, Path(i.path).name, stream) and not Path(i.path).exists()]
    versioning.pull([item for item in items if item not in partly], root)
    return {Path(item.path).name: Part(_bring_part(stage, item, root, stream), item) for item in partly}


def _in_part(stage: Stage, name: str, stream: bool) -> bool:
    return stage.reads_part_of(name) or (stream and stage.streams_part_of(name))


def _bring_part(stage: Stage, item: Lineage, root: str, stream: bool) -> Path:
    """Download the files of the folder `item` that the stage reads, unless they are here; return where they lie.

    stream: note in STREAMED where the others are that it reads.
    """
    name = Path(item.path).name
    folder = PARTS / item.md5.removesuffix(".dir") / stage.name
    read = [f for f in results_store.stored_files(root, item) if stage.reads_file(name, f["relpath"])]
    streamed = {f["relpath"]: f["md5"] for f in read if stream and stage.streams_file(name, f["relpath"])}
    _bring_files(item, [f for f in read if f["relpath"] not in streamed], folder, root)
    if streamed:
        write_json(folder / STREAMED, {path: versioning.stored_object(root, md5) for path, md5 in streamed.items()})
    return folder


def _bring_files(item: Lineage, files: Sequence[Mapping[str, str]], folder: Path, root: str) -> None:
    if all(_has(folder / f["relpath"], f["md5"]) for f in files) and folder.is_dir():
        return
    with (
        atomic_folder(folder) as temporary,
        ui.progress(files, desc=f"bringing {item.path} in part", unit="file", leave=False, delay=2) as bar,
    ):
        for file in bar:
            _bring_file(root, file["md5"], temporary / PurePosixPath(file["relpath"]))


def _bring_file(root: str, md5: str, target: Path) -> None:
    source = versioning.stored_object(root, md5)
    storage.download(source, target)
    if not _has(target, md5):
        raise UserError(f"{source} is damaged; delete it there and push it again (`dvc push` in a clone that has it)")


def _has(path: Path, md5: str) -> bool:
    """Return whether the file is there with this content."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest() == md5
