"""The MLflow side of the journal: one method per operation, each safe to repeat."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import DatasetInput, InputTag, LoggedModelStatus, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from flows.tracking.datasets import dvc_dataset
from svd.core.files import exclusive, write_json
from svd.storage import sha256

KEY_TAG = "svd.run_key"
# The courier tries again by itself; MLflow's own retries would hold up the end of a stage for minutes.
CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "600",
}
BATCH = 500
BAD_REQUEST = 400
logger = logging.getLogger(__name__)


def checkpoint_digest(folder: Path) -> str:
    """Return a name for the weights in a stage's output; the registered version has it as its tag `checkpoint`."""
    digests = [bytes.fromhex(sha256(path)) for path in sorted(folder.rglob("*.safetensors"))]
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def bound_requests() -> None:
    """Let MLflow's client give up early, unless the environment says otherwise."""
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)


def find_experiment(client: mlflow.MlflowClient, uri: str, name: str) -> str:
    """Return the id of an experiment, which is made if need be; with SQLite its artifacts lie beside the database."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:  # another run made it in between
        return str(client.get_experiment_by_name(name).experiment_id)


class Delivery:
    """The sender of one run's journal entries to the MLflow server at `uri`."""

    def __init__(self, uri: str, experiment: str) -> None:
        bound_requests()
        self._uri = uri
        self._experiment = experiment
        self._client: mlflow.MlflowClient | None = None
        self._run_id = ""
        self._continued = False
        self._logged: dict[str, dict[int, float]] = {}
        self._lock = Path()

    def __call__(self, entry: dict[str, Any], files: Path) -> None:
        """Deliver one entry; raises what MLflow's client raises when the server can't be reached."""
        if self._client is None:
            self._client = mlflow.MlflowClient(self._uri)
            self._lock = files.parents[1] / ".runs.lock"
        try:
            self._dispatch(entry, files)
        except MlflowException as error:
            if error.get_http_status_code() != BAD_REQUEST:
                raise
            logger.warning("MLflow refuses a '%s' entry for good, it is left out: %s", entry["op"], error)

    def _dispatch(self, entry: dict[str, Any], files: Path) -> None:
        operation = entry["op"]
        if operation != "start" and not self._run_id:
            self._start(self._first_entry(files))
        {
            "start": lambda: self._start(entry),
            "metrics": lambda: self._metrics(entry["items"]),
            "cost": lambda: self._cost(entry),
            "tags": lambda: self._tags(entry["tags"]),
            "file": lambda: self._file(files / entry["name"], entry["folder"]),
            "lineage": lambda: self._lineage(entry),
            "model": lambda: self._model(entry),
            "end": lambda: self._end(entry),
        }[operation]()

    @property
    def client(self) -> mlflow.MlflowClient:
        """Return the client; there is one once an entry was delivered."""
        assert self._client is not None
        return self._client

    @staticmethod
    def _first_entry(files: Path) -> dict[str, Any]:
        with (files.parent / "journal.jsonl").open() as stream:
            first: dict[str, Any] = json.loads(stream.readline())
        return first

    def _experiment_id(self) -> str:
        return find_experiment(self.client, self._uri, self._experiment)

    def find_run(self, key: str) -> str | None:
        """Return the id of the run that carries `key`, if MLflow has it."""
        found = self.client.search_runs([self._experiment_id()], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _create(self, key: str, name: str, start: int, tags: Mapping[str, str], parent: str | None) -> str:
        marks = {KEY_TAG: key, MLFLOW_RUN_NAME: name, **tags}
        if parent:
            parent_id = self.find_run(parent) or self._create(parent, "full-pipeline", start, {}, None)
            marks[MLFLOW_PARENT_RUN_ID] = parent_id
        run = self.client.create_run(self._experiment_id(), start_time=start, tags=marks, run_name=name)
        return str(run.info.run_id)

    def _start(self, entry: dict[str, Any]) -> None:
        with exclusive(self._lock):  # a stage and its pipeline may both be the first to name the pipeline's run
            found = self.find_run(entry["key"])
            if found is None:
                self._run_id = self._create(entry["key"], entry["name"], entry["time"], entry["tags"], entry["parent"])
        if found:
            self._run_id, self._continued = found, True
            self.client.update_run(found, status="RUNNING")
            self._tags(entry["tags"])
        params = [Param(name, str(value)[:6000]) for name, value in entry["params"].items()]
        for i in range(0, len(params), 100):
            self.client.log_batch(self._run_id, params=params[i : i + 100])

    def _metrics(self, items: list[list[Any]]) -> None:
        new = [Metric(*item) for item in items if not self._is_logged(item[0], item[1], item[3])]
        for i in range(0, len(new), BATCH):
            self.client.log_batch(self._run_id, metrics=new[i : i + BATCH])

    def _is_logged(self, name: str, value: float, step: int) -> bool:
        """Return whether the run had this step of a metric when this process found it.

        A stage that goes on on another machine has no journal of what it logged there, and does the steps since its
        last snapshot again. Step 0 is also that of results, which may be new ones.
        """
        if not self._continued:
            return False
        if name not in self._logged:
            history = self.client.get_metric_history(self._run_id, name)
            self._logged[name] = {metric.step: metric.value for metric in history}
        return step in self._logged[name] and (step > 0 or self._logged[name][0] == value)

    def _cost(self, entry: dict[str, Any]) -> None:
        """Log a stage's hours to its pipeline's run, and their sums with those of the stages that MLflow knows of."""
        known = self.client.get_run(self._run_id).data.metrics
        new = {f"{entry['stage']}/cost_{kind}": value for kind, value in entry["hours"].items()}
        sums = {
            kind: sum(v for n, v in (known | new).items() if n.endswith(f"/cost_{kind}")) for kind in entry["hours"]
        }
        new |= {f"cost/{kind}": value for kind, value in sums.items()}
        if prices := entry["prices"]:
            new["cost/total"] = sum(sums[kind] * price for kind, price in prices.items())
        changed = {name: value for name, value in new.items() if known.get(name) != value}
        metrics = [Metric(name, value, entry["time"], self._next_step(name)) for name, value in changed.items()]
        self.client.log_batch(self._run_id, metrics=metrics)

    def _next_step(self, name: str) -> int:
        return max((metric.step + 1 for metric in self.client.get_metric_history(self._run_id, name)), default=0)

    def _tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self._run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def _file(self, path: Path, folder: str) -> None:
        self.client.log_artifact(self._run_id, str(path), folder or None)

    def _lineage(self, entry: dict[str, Any]) -> None:
        tags = [InputTag(MLFLOW_DATASET_CONTEXT, entry["context"])]
        inputs = [DatasetInput(dvc_dataset(**item)._to_mlflow_entity(), tags) for item in entry["items"]]
        self.client.log_inputs(self._run_id, datasets=inputs)
        self._tags({f"dvc.{entry['context']}.{item['name']}": item["md5"] for item in entry["items"]})

    def _model(self, entry: dict[str, Any]) -> None:
        name, folders, settings = entry["name"], entry["folders"], entry["settings"]
        digest = str(settings["checkpoint"])
        version = self._registered(name, digest)
        if version is None and checkpoint_digest(Path(folders["model"])) != digest:
            logger.warning("%s does not hold checkpoint %s any more, it isn't registered", folders["model"], digest)
            return
        if version is None:
            version = self._register(name, folders, settings)
        self.client.set_registered_model_alias(name, "candidate", version)
        self._describe(name, version, str(settings.get("description", "")))

    def _describe(self, name: str, version: str, text: str) -> None:
        """Describe a version, unless it has a description, which may be a person's."""
        if text and not self.client.get_model_version(name, version).description:
            self.client.update_model_version(name, version, text)

    def _registered(self, name: str, digest: str) -> str | None:
        """Return the version of `name` that was made from the same checkpoint, if there is one."""
        versions = self.client.search_model_versions(f"name = '{name}'")
        return next((str(v.version) for v in versions if v.tags.get("checkpoint") == digest), None)

    def _register(self, name: str, folders: Mapping[str, str], settings: Mapping[str, Any]) -> str:
        mlflow.set_tracking_uri(self._uri)
        tags = {key: str(settings[key]) for key in ("checkpoint", "task") if key in settings}
        with mlflow.start_run(run_id=self._run_id):
            uri = self._uploaded(tags["checkpoint"]) or self._upload(name, folders, settings, tags)
            # With its tag from the start: a kill in between must not leave a version that nothing recognises.
            made = mlflow.register_model(uri, name, tags=tags)
        return str(made.version)

    def _uploaded(self, digest: str) -> str | None:
        """Return the model that a killed delivery had uploaded for this run; what it had only begun is removed."""
        query = f"source_run_id = '{self._run_id}' AND tags.checkpoint = '{digest}'"
        for model in self.client.search_logged_models([self._experiment_id()], query):
            if model.status == LoggedModelStatus.READY:
                return str(model.model_uri)
            self.client.delete_logged_model(model.model_id)
        return None

    @staticmethod
    def _upload(name: str, folders: Mapping[str, str], settings: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Log the model in the active run; return its URI.

        The settings are a file of it: as `model_config`, MLflow would make params of the run out of them.
        """
        with tempfile.TemporaryDirectory() as temporary:
            kept = Path(temporary) / "settings.json"
            beside = ("signature", "card", "description")  # journals of an earlier version lack some of them
            write_json(kept, {key: value for key, value in settings.items() if key not in beside})
            card = Path(temporary) / "README.md"
            card.write_text(str(settings.get("card", "")))
            described = settings.get("signature")
            info = mlflow.pyfunc.log_model(
                name=name,
                python_model=str(Path(__file__).parent.parent / "serving" / "model.py"),
                artifacts={**folders, "settings": str(kept), "card": str(card)},
                signature=ModelSignature.from_dict(described) if described else None,
                metadata=dict(tags),
                tags=dict(tags),
                pip_requirements=["svd-platform"],
            )
        return str(info.model_uri)

    def _end(self, entry: dict[str, Any]) -> None:
        self.client.set_terminated(self._run_id, status=entry["status"], end_time=entry["time"])
