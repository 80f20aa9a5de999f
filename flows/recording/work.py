"""Work folders between the end of a stage and the moment its output is recorded in `dvc.lock`.

Recording hashes the output, copies it into DVC's cache and may push it, which takes long for large ones. A kill in that
time must not cost the stage: its work folder stays until then, with what was published (svd.stage.publish) and, once
the MLflow run has ended, `delivered.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from flows.places import Place, run_key_of
from flows.recording import dvc as versioning
from flows.recording import work_store
from flows.recording.code import code_digest, packages_digest
from flows.recording.results_store import stored_output
from flows.stages import STAGES, Stage
from flows.tracking.runs import Lineage
from svd.config import Preset
from svd.core.files import write_json
from svd.stage import KEPT, Report, discard_published, republish

CODE = "code.sha256"
DELIVERED = "delivered.json"


def dvc_records() -> bool:
    """Return whether `dvc repro` runs this process, and so records the output after its end."""
    return "DVC_STAGE" in os.environ


def mark_delivered(work: Path, output: Lineage) -> None:
    """Note that nothing is left to do for `output` but to record it."""
    write_json(work / DELIVERED, vars(output))


def delivered_work(place: Place) -> Path:
    """Return the work folder whose output is published and not yet recorded; the stage's `works` when there is none."""
    return max((note.parent for note in place.works.glob(f"*/{DELIVERED}")), key=_changed, default=place.works)


def _changed(work: Path) -> float:
    return (work / DELIVERED).stat().st_mtime


def forget_ended(stage: Stage, work: Path, store: str | None = None) -> bool:
    """Forget what is left of a run whose output is recorded, here or in the store, or was made by other code.

    Work in progress stays. Returns whether a published output is left of which MLflow knows.
    """
    code, delivered = f"{code_digest(stage)} {packages_digest()}", (work / DELIVERED).is_file()
    same = (work / CODE).is_file() and (work / CODE).read_text() == code
    if delivered and same and not _recorded(work, store):
        return True
    if delivered:
        close_work(work)
        work.mkdir()
    elif not same:
        discard_published(work)
    (work / CODE).write_text(code)
    return False


def published_before(work: Path, output: Path, store: str | None) -> Report | None:
    """Bring back the output that an earlier run in `work` published, from here or, by its hash, from the store.

    Returns its report; None when no run got that far.
    """
    if (work / KEPT).is_dir() or not (work / DELIVERED).is_file():
        return republish(work, output)
    versioning.pull([Lineage(**json.loads((work / DELIVERED).read_text()))], store)
    return Report(**json.loads((work / f"{KEPT}.json").read_text()))


def close_work(work: Path) -> None:
    """Remove a work folder and the key of its run."""
    shutil.rmtree(work, ignore_errors=True)
    run_key_of(work).unlink(missing_ok=True)


def clear_work(preset: Preset, stage: str, store: str | None = None, recorded: str = "") -> None:
    """Remove the stage's work whose output is recorded; unfinished work for other options stays.

    store, recorded: where its snapshot lies, and the hash of the output that was recorded.
    """
    if store:
        work_store.forget_recorded(store, preset.name, stage, recorded)
    folder = Place(preset.name, stage).works
    for note in folder.glob(f"*/{DELIVERED}"):
        close_work(note.parent)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def clear_recorded(preset: Preset) -> None:
    """Remove the work of stages that `dvc repro` has recorded after their end."""
    for stage in STAGES:
        if any(_recorded(note.parent) for note in Place(preset.name, stage).works.glob(f"*/{DELIVERED}")):
            clear_work(preset, stage)


def _recorded(work: Path, store: str | None = None) -> bool:
    """Return whether `dvc.lock`, here or in the store, has the output that was made in `work`."""
    if not (work / DELIVERED).is_file():
        return False
    made, place = json.loads((work / DELIVERED).read_text()), Place.of_work(work)
    _, outputs = versioning.lineage(place.stage, place.preset)
    if store and (stored := stored_output(store, place.preset, place.stage)):
        outputs = [*outputs, stored]
    return any((item.path, item.md5) == (made["path"], made["md5"]) for item in outputs)
