"""MLflow's artifacts of runs and models that were deleted, as `mlflow gc` means it, but through any server.

Their records stay, which are small: only MLflow's own database tool can remove those. A registered version keeps its
model and the runs behind it, whatever was deleted.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from flows.cleaning.kinds import Kind, Thing
from flows.lineage.records import GONE, Records, away
from flows.tracking.runs import EXPERIMENT, tracking_uri
from svd.core.files import write_json

RUN = re.compile(r"[0-9a-f]{32}")
MODEL = re.compile(r"m-[0-9a-f]{32}")
GONE_FOR_GOOD = float("inf")


def unreferenced(records: Records, now: float, old: float, note: Path) -> Kind:
    """Look at the artifacts of the project's experiment: those of runs and models deleted for `old` seconds go.

    MLflow doesn't tell its clients when a run was deleted; the time since its end stands for it. Of a model, and of a
    run whose record is gone, it tells nothing, perhaps because its database came back from a backup: their time counts
    from the first look, which is kept in the file `note`. What stays is not measured: over http that would take a
    request per folder. Raises svd.core.retries.Unreachable.
    """
    with _answered():
        return _sorted(records, now, old, note)


@contextmanager
def _answered() -> Iterator[None]:
    """Raise svd.core.retries.Unreachable for whatever MLflow refuses."""
    try:
        yield
    except MlflowException as error:
        raise away(error) from None


def _sorted(records: Records, now: float, old: float, note: Path) -> Kind:
    experiment = records.client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return Kind("MLflow artifacts", lambda names: None)
    repository = get_artifact_repository(experiment.artifact_location, tracking_uri())

    def remove(names: list[str]) -> None:
        with _answered():
            for name in names:
                repository.delete_artifacts(name)

    kind = Kind("MLflow artifacts", remove)
    wanted = {run.id for run in records.behind_models()} | {model.run_id for model in records.models}
    wanted |= {posixpath.basename(model.source) for model in records.models}
    seen: dict[str, float] = json.loads(note.read_text()) if note.is_file() else {}
    gone: dict[str, float] = {}
    for name, age in _folders(repository, records, now):
        if age == GONE_FOR_GOOD:
            gone[name] = seen.get(name, now)
            age = now - gone[name]
        if age is None or age <= old or posixpath.basename(name) in wanted:
            kind.kept.append(Thing(name, None, age or 0.0))
        else:
            kind.doomed.append(Thing(name, _size(repository, name), age))
    write_json(note, gone)
    return kind


def _folders(repository: Any, records: Records, now: float) -> Iterator[tuple[str, float | None]]:
    """Yield the artifact folder of each run and model, with the seconds since the end of a deleted one (else None)."""
    for info in repository.list_artifacts():
        name = posixpath.basename(info.path.rstrip("/"))
        if info.is_dir and RUN.fullmatch(name):
            yield name, _run_age(records, name, now)
    for info in repository.list_artifacts("models"):
        name = posixpath.basename(info.path.rstrip("/"))
        if info.is_dir and MODEL.fullmatch(name):
            yield f"models/{name}", _model_age(records, name, now)


def _run_age(records: Records, run_id: str, now: float) -> float | None:
    try:
        info = records.client.get_run(run_id).info
    except MlflowException as error:
        if error.error_code in GONE:
            return GONE_FOR_GOOD
        raise
    ended = (info.end_time or info.start_time) / 1000
    return now - ended if info.lifecycle_stage == LifecycleStage.DELETED else None


def _model_age(records: Records, model_id: str, now: float) -> float | None:
    try:
        records.client.get_logged_model(model_id)
    except MlflowException as error:
        if error.error_code in GONE:
            return GONE_FOR_GOOD
        raise
    return None


def _size(repository: Any, folder: str) -> int:
    total, queue = 0, [folder]
    while queue:
        for info in repository.list_artifacts(queue.pop()):
            if info.is_dir:
                queue.append(info.path)
            else:
                total += int(info.file_size or 0)
    return total
