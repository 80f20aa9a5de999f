"""Work folders between the end of a stage and the moment its output is recorded in `dvc.lock`.

Recording hashes the output, copies it into DVC's cache and may push it, which takes long for large ones. A kill in that
time must not cost the stage: its work folder stays until then, with what was published (svd.stage.publish) and, once
MLflow knows of the run, `told.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from flows.recording import dvc as versioning
from flows.stages import ROOT, Stage, described
from flows.tracking.runs import Lineage
from svd.config import Preset
from svd.core.files import write_json
from svd.stage import discard_published

WORK = Path("work")
CODE = "code.sha256"
TOLD = "told.json"


def dvc_records() -> bool:
    """Whether `dvc repro` runs this process, and so records the output after its end."""
    return "DVC_STAGE" in os.environ


def code_digest(stage: Stage) -> str:
    """Names the code that makes the stage's output: the files and folders that dvc.yaml lists for it, by content."""
    digest = hashlib.sha256()
    for dep in (ROOT / name for name in described(stage.name)["deps"] if not name.startswith("outputs/")):
        for path in sorted(dep.rglob("*")) if dep.is_dir() else [dep]:
            if path.is_file() and path.suffix != ".pyc":
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def mark_told(work: Path, output: Lineage) -> None:
    """Note that nothing is left to do for `output` but to record it."""
    write_json(work / TOLD, vars(output))


def settle(stage: Stage, work: Path) -> bool:
    """Forget what is left of a run that is over: one whose output `dvc.lock` has, or was made by other code.

    Work in progress stays. Returns whether a published output is left of which MLflow knows.
    """
    code, told = code_digest(stage), (work / TOLD).is_file()
    same = (work / CODE).is_file() and (work / CODE).read_text() == code
    if told and same and not _recorded(work):
        return True
    if told:
        close_work(work)
        work.mkdir()
    elif not same:
        discard_published(work)
    (work / CODE).write_text(code)
    return False


def key_file(work: Path) -> Path:
    """Where the MLflow key of the run that works in `work` is kept."""
    return work.with_name(f"{work.name}.run")


def close_work(work: Path) -> None:
    """Remove a work folder and the key of its run."""
    shutil.rmtree(work, ignore_errors=True)
    key_file(work).unlink(missing_ok=True)


def _recorded(work: Path) -> bool:
    """Whether `dvc.lock` has the output that was made in work/<preset>/<stage>/<digest>."""
    if not (work / TOLD).is_file():
        return False
    made, (preset, stage) = json.loads((work / TOLD).read_text()), work.parts[-3:-1]
    return any((item.path, item.md5) == (made["path"], made["md5"]) for item in versioning.lineage(stage, preset)[1])


def clear_work(preset: Preset, stage: str) -> None:
    """Remove the stage's work whose output is recorded; unfinished work for other options stays."""
    folder = WORK / preset.name / stage
    for told in folder.glob(f"*/{TOLD}"):
        close_work(told.parent)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def clear_recorded(preset: Preset) -> None:
    """Remove the work of stages that `dvc repro` has recorded after their end."""
    for told in (WORK / preset.name).glob(f"*/*/{TOLD}"):
        if _recorded(told.parent):
            clear_work(preset, told.parts[-3])
