"""The graph of runs and data that MLflow has recorded: which run made a hash, of which others, and who read it."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from mlflow.entities import Run, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from flows.stages import STAGES
from flows.tracking.mlflow_delivery import bound_requests
from flows.tracking.runs import EXPERIMENT, tracking_uri
from svd.core.errors import UserError
from svd.core.retries import Unreachable

PAGE = 1000
GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # how servers say that there is none


@dataclass(frozen=True)
class StageRun:
    """A run of a stage: the DVC hashes of its inputs and outputs by the names of the stages that made them."""

    id: str
    stage: str
    preset: str
    commit: str
    status: str
    started: int
    pipeline: str | None
    inputs: dict[str, str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class Data:
    """The output of a stage at a DVC hash, and the run that made it; None when MLflow knows of none."""

    stage: str
    md5: str
    run: StageRun | None


@dataclass(frozen=True)
class Model:
    """A registered version: its aliases, and the run behind it."""

    name: str
    version: str
    aliases: tuple[str, ...]
    run_id: str
    source: str


class Records:
    """All runs of stages that MLflow knows, deleted ones included, and all registered versions.

    Raises svd.core.retries.Unreachable in one line when MLflow is away.
    """

    def __init__(self) -> None:
        bound_requests()
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        self.client = mlflow.MlflowClient(tracking_uri())
        self.runs: dict[str, StageRun] = {}
        self._makers: dict[tuple[str, str], list[StageRun]] = defaultdict(list)
        self.readers: dict[tuple[str, str], list[StageRun]] = defaultdict(list)
        for run in sorted(self._read_runs(), key=lambda run: run.started):
            self._add(run)
        self.models = self._read_models()

    def _read_runs(self) -> Iterator[StageRun]:
        try:
            experiment = self.client.get_experiment_by_name(EXPERIMENT)
            token = None if experiment else ""
            while token != "":
                ids = [experiment.experiment_id]
                found = self.client.search_runs(ids, "", ViewType.ALL, PAGE, page_token=token)
                yield from (stage_run(run) for run in found if run.data.tags.get("stage") in STAGES)
                token = found.token or ""
        except MlflowException as error:
            raise away(error) from None

    def _add(self, run: StageRun) -> None:
        self.runs[run.id] = run
        for item in run.inputs.items():
            self.readers[item].append(run)
        for item in run.outputs.items():
            self._makers[item].append(run)

    def _read_models(self) -> list[Model]:
        try:
            aliases = {m.name: m.aliases for m in _pages(self.client.search_registered_models)}
            return [_model(v, aliases.get(v.name, {})) for v in _pages(self.client.search_model_versions)]
        except MlflowException as error:
            raise away(error) from None

    def maker(self, stage: str, md5: str) -> StageRun | None:
        """Return the first run that made the output of `stage` with this hash."""
        return next(iter(self._makers.get((stage, md5), ())), None)

    def makes_any(self, hashes: Collection[str]) -> bool:
        """Return whether some run has made one of these."""
        return any(md5 in hashes for _, md5 in self._makers)

    def find_run(self, run_id: str) -> StageRun | None:
        """Return the run of a stage, in whatever experiment it is; None when there is none."""
        if run_id in self.runs or not run_id:
            return self.runs.get(run_id)
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in GONE:
                return None
            raise away(error) from None
        return stage_run(run) if "stage" in run.data.tags else None

    def hashes(self, stage: str) -> list[str]:
        """Return all known hashes of the output of `stage`, as made or as read, oldest first."""
        return list(dict.fromkeys(md5 for name, md5 in (*self._makers, *self.readers) if name == stage))

    def ancestry(self, run: StageRun) -> list[Data]:
        """Return all data that went into `run`, directly or through other runs, nearest first.

        Several runs may have made the same bytes of different data, such as catalogues that differ in dropped clips
        alone. Which of them wrote those that were read is not known, so what each of them read is here.
        """
        found: dict[tuple[str, str], Data] = {}
        queue = list(run.inputs.items())
        while queue:
            item = queue.pop(0)
            if item not in found:
                found[item] = Data(*item, self.maker(*item))
                queue += [read for maker in self._makers.get(item, ()) for read in maker.inputs.items()]
        return list(found.values())

    def chain(self, run: StageRun) -> list[StageRun]:
        """Return `run` and all runs that made what went into it, nearest first."""
        makers = (one for data in self.ancestry(run) for one in self._makers.get((data.stage, data.md5), ()))
        return list({one.id: one for one in (run, *makers)}.values())

    def behind_models(self) -> list[StageRun]:
        """Return the runs of all registered versions, and all runs that made what went into them."""
        runs = filter(None, (self.find_run(model.run_id) for model in self.models))
        return list({one.id: one for run in runs for one in self.chain(run)}.values())

    def preset(self, run: StageRun) -> dict[str, Any] | None:
        """Return the preset that the run has logged; None when it is gone."""
        with TemporaryDirectory() as folder:
            try:
                return dict(
                    json.loads(Path(self.client.download_artifacts(run.id, "config/preset.json", folder)).read_text())
                )
            except (MlflowException, OSError, ValueError):
                return None

    def find_model(self, name: str) -> Model | None:
        """Return the version that `NAME@ALIAS` or `NAME/VERSION` names; None when `name` is neither.

        Raises UserError for a registered model without that version, with what there is.
        """
        parts = re.fullmatch(r"(?:models:/)?([^@/]+)(?:@(.+)|/(\d+))?", name)
        versions = [model for model in self.models if parts and model.name == parts[1]]
        if not versions:
            return None
        assert parts
        for model in versions:
            if (parts[2] and parts[2] in model.aliases) or (parts[3] and model.version == parts[3]):
                return model
        known = [f"{parts[1]}/{model.version}" for model in versions]
        known += [f"{parts[1]}@{alias}" for model in versions for alias in model.aliases]
        raise UserError(f"'{name}' names no version; there are {', '.join(sorted(known))}")


def stage_run(run: Run) -> StageRun:
    """Return what the tags of an MLflow run say of a stage."""
    tags = run.data.tags

    def hashes(context: str) -> dict[str, str]:
        prefix = f"dvc.{context}."
        return {name.removeprefix(prefix): md5 for name, md5 in tags.items() if name.startswith(prefix)}

    return StageRun(
        run.info.run_id,
        tags["stage"],
        tags.get("preset", ""),
        tags.get("git.commit", "unknown"),
        run.info.status,
        run.info.start_time,
        tags.get(MLFLOW_PARENT_RUN_ID),
        hashes("input"),
        hashes("output"),
    )


def _model(version: ModelVersion, aliases: dict[str, str]) -> Model:
    mine = tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(version.version)))
    return Model(version.name, str(version.version), mine, version.run_id or "", version.source or "")


def _pages(search: Any) -> Iterator[Any]:
    """Yield what all pages of a search have."""
    token = None
    while token != "":
        found = search(max_results=PAGE, page_token=token)
        yield from found
        token = found.token or ""


def away(error: MlflowException) -> Unreachable:
    """Return what is said of an MLflow that refuses or doesn't answer, in one line."""
    return Unreachable(f"MLflow at {tracking_uri()} can't be asked: {str(error).splitlines()[0][:160]}")
