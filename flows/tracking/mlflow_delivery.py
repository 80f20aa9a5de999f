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


class Delivery:
    """The sender of one run's journal entries to the MLflow server at `uri`."""

    def __init__(self, uri: str, experiment: str) -> None:
        for name, value in CLIENT_SETTINGS.items():
            os.environ.setdefault(name, value)
        self._uri = uri
        self._experiment = experiment
        self._client: mlflow.MlflowClient | None = None
        self._run_id = ""
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
        found = self.client.get_experiment_by_name(self._experiment)
        if found is not None:
            return str(found.experiment_id)
        location = None
        if self._uri.startswith("sqlite:///"):
            location = (Path(self._uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts").as_uri()
        try:
            return str(self.client.create_experiment(self._experiment, artifact_location=location))
        except MlflowException:  # another run made it in between
            return str(self.client.get_experiment_by_name(self._experiment).experiment_id)

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
            self._run_id = found
            self.client.update_run(found, status="RUNNING")
            self._tags(entry["tags"])
        params = [Param(name, str(value)[:6000]) for name, value in entry["params"].items()]
        for i in range(0, len(params), 100):
            self.client.log_batch(self._run_id, params=params[i : i + 100])

    def _metrics(self, items: list[list[Any]]) -> None:
        for i in range(0, len(items), BATCH):
            batch = [Metric(name, value, stamp, step) for name, value, stamp, step in items[i : i + BATCH]]
            self.client.log_batch(self._run_id, metrics=batch)

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
            write_json(kept, {key: value for key, value in settings.items() if key != "signature"})
            described = settings.get("signature")  # journals of an earlier version have none
            info = mlflow.pyfunc.log_model(
                name=name,
                python_model=str(Path(__file__).parent.parent / "serving" / "model.py"),
                artifacts={**folders, "settings": str(kept)},
                signature=ModelSignature.from_dict(described) if described else None,
                metadata=dict(tags),
                tags=dict(tags),
                pip_requirements=["svd-platform"],
            )
        return str(info.model_uri)

    def _end(self, entry: dict[str, Any]) -> None:
        self.client.set_terminated(self._run_id, status=entry["status"], end_time=entry["time"])
