"""Runs in a real MLflow store (SQLite): nesting, params, metrics, pictures, lineage, and resumption without doubles."""

import hashlib
import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import mlflow
import numpy as np
import pytest
import small_project

from flows.running import runner
from flows.stages import STAGES
from flows.tracking.journal import Journal
from flows.tracking.mlflow_delivery import Delivery, checkpoint_digest
from flows.tracking.runs import Lineage, MlflowTracker, RunInfo, flat_params, send_pending, tracked_run, tracking_uri
from svd.config.load import load_preset
from svd.stage import Report, StageContext


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return mlflow.MlflowClient(f"sqlite:///{tmp_path}/.local/mlflow.db")


def find(client: mlflow.MlflowClient, key: str) -> mlflow.entities.Run:
    experiment = client.get_experiment_by_name("stable-video-diffusion")
    runs = client.search_runs([experiment.experiment_id], f"tags.`svd.run_key` = '{key}'")
    assert len(runs) == 1
    return runs[0]


def test_flat_params_names_nested_options() -> None:
    values = {"a": {"b": 1, "c": [{"d": 2}, {"d": 3}]}, "e": [1, 2]}
    assert flat_params(values) == {"a.b": 1, "a.c.0.d": 2, "a.c.1.d": 3, "e": [1, 2]}


def test_a_password_in_the_address_moves_to_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:p%40ss@host:8/mlflow")
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "old")
    for _ in range(2):
        assert tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == "https://host:8/mlflow"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "user" and os.environ["MLFLOW_TRACKING_PASSWORD"] == "p@ss"


def test_what_waits_and_what_is_said_names_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 0)  # it would try for 100 s
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:SECRET@127.0.0.1:9/mlflow")
    params = {"sources": {"paths": ["https://user:SECRET@host/a.mp4?v=1&sig=SECRET"]}}
    with tracked_run(RunInfo("one", "stage", params=params), patience=0) as tracker:
        tracker.register_model("model", {}, {"preset": params})
    written = b"".join(path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file())
    assert b"https://host/a.mp4?v=1" in written and b"SECRET" not in written
    assert "MLflow at postgresql://127.0.0.1:9/mlflow can't be reached" in caplog.text and "SECRET" not in caplog.text


def test_a_nested_run_with_everything_in_it(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"clip")
    with tracked_run(RunInfo("parent", "full-pipeline")):
        info = RunInfo("child", "curation", "parent", {"stage": "curation"}, {"model": {"width": 8}})
        with tracked_run(info) as tracker:
            tracker.log_metrics({"loss": 0.5}, step=1)
            tracker.log_metrics({"loss": 0.25}, step=2)
            tracker.log_image("samples/grid", np.zeros((8, 8, 3), np.uint8), step=2)
            tracker.log_file(tmp_path / "clip.mp4", "samples")
            tracker.log_lineage("input", [Lineage("clips", "outputs/tiny/curation", "0" * 32 + ".dir", 10, 2)])
    run = find(client, "child")
    assert run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "8"
    assert run.data.tags["mlflow.parentRunId"] == find(client, "parent").info.run_id
    assert [m.value for m in client.get_metric_history(run.info.run_id, "loss")] == [0.5, 0.25]
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest, dataset.source_type) == ("clips", "0" * 32 + ".dir", "dvc")
    names = {a.path for folder in ("samples", "images") for a in client.list_artifacts(run.info.run_id, folder)}
    assert "samples/clip.mp4" in names
    assert sum(name.startswith("images/samples~grid+step+2") for name in names) == 2


def test_stage_and_pipeline_make_the_pipelines_run_once(
    client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both look for it at the same moment and find nothing."""
    real = Delivery.find_run

    def slow(self: Delivery, key: str) -> str | None:
        found = real(self, key)
        time.sleep(1 if key == "parent" else 0)
        return found

    monkeypatch.setattr(Delivery, "find_run", slow)
    with tracked_run(RunInfo("parent", "full-pipeline")), tracked_run(RunInfo("child", "curation", "parent")):
        pass
    assert find(client, "child").data.tags["mlflow.parentRunId"] == find(client, "parent").info.run_id


def test_a_resumed_run_logs_no_step_twice(client: mlflow.MlflowClient) -> None:
    with pytest.raises(RuntimeError), tracked_run(RunInfo("stage-1", "stage"), patience=0) as tracker:
        # what a kill leaves behind: an undelivered journal that already holds these steps
        tracker._journal.deliver = _unreachable  # type: ignore[method-assign]
        for step in range(6):
            tracker.log_metrics({"loss": float(step)}, step)
        raise RuntimeError("killed")
    with tracked_run(RunInfo("stage-1", "stage")) as tracker:
        for step in range(4, 10):
            tracker.log_metrics({"loss": float(step)}, step)
    run = find(client, "stage-1")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [m.step for m in history] == list(range(10))
    assert run.info.status == "FINISHED"


def test_steps_done_again_on_another_machine_are_logged_once(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    """The other machine has the key of the run and its last snapshot, but not the journal."""
    for machine, steps in (("one", (1, 2, 3)), ("other", (2, 3, 4))):
        with tracked_run(RunInfo("moved", "stage"), spool=tmp_path / machine) as tracker:
            for step in steps:
                tracker.log_metrics({"loss": 1 / step}, step=step)
            tracker.log_metrics({"clips": 12}, step=0)
    history = client.get_metric_history(find(client, "moved").info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]
    assert find(client, "moved").data.metrics["clips"] == 12


def test_what_could_not_be_sent_is_sent_later_once(
    client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with tracked_run(RunInfo("offline", "stage"), patience=0) as tracker:
        tracker.log_metrics({"loss": 1.0}, step=3)
    assert send_pending() == (0, 1)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert send_pending() == (1, 0)
    assert send_pending() == (0, 0)
    run = find(client, "offline")
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(3, 1.0)]


def weights(folder: Path, text: str) -> Path:
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "unet" / "model.safetensors").write_text(text)
    return folder


def register(tracker: MlflowTracker, folder: Path) -> str:
    """Register what lies in `folder` as the runner does; returns its digest."""
    digest = checkpoint_digest(folder)
    tracker.register_model("svd-test", {"model": folder}, {"checkpoint": digest})
    return digest


def versions(client: mlflow.MlflowClient) -> dict[str, str]:
    return {str(v.version): v.tags["checkpoint"] for v in client.search_model_versions("name = 'svd-test'")}


def test_a_model_is_registered_once_under_the_weights_it_holds(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    folder = weights(tmp_path / "model", "A")
    for key in ("first", "again"):
        with tracked_run(RunInfo(key, "stage")) as tracker:
            digest = register(tracker, folder)
    assert versions(client) == {"1": digest}
    assert str(client.get_model_version_by_alias("svd-test", "candidate").version) == "1"


@pytest.mark.parametrize("later", ["retrained", "removed"])
def test_weights_that_are_gone_are_not_registered_and_block_nothing(
    client: mlflow.MlflowClient, tmp_path: Path, later: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = weights(tmp_path / "model", "A")
    with monkeypatch.context() as away:
        away.setattr(Journal, "deliver", lambda self, send: _unreachable(send))
        with tracked_run(RunInfo("late", "stage"), patience=0) as tracker:
            register(tracker, folder)
            tracker.log_metrics({"loss": 1.0}, step=3)
    weights(folder, "B") if later == "retrained" else shutil.rmtree(folder)
    assert send_pending() == (1, 0)
    assert versions(client) == {}
    run = find(client, "late")
    assert (run.info.status, run.data.metrics["loss"]) == ("FINISHED", 1.0)


def test_a_kill_right_after_the_version_was_made_makes_no_second_one(
    client: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = weights(tmp_path / "model", "A")
    with monkeypatch.context() as killed:
        killed.setattr(mlflow.MlflowClient, "set_registered_model_alias", lambda *_: _unreachable(None))
        killed.setattr(mlflow.MlflowClient, "set_model_version_tag", lambda *_: _unreachable(None))
        with tracked_run(RunInfo("killed", "stage"), patience=0) as tracker:
            digest = register(tracker, folder)
    assert send_pending() == (1, 0)
    assert versions(client) == {"1": digest}


@pytest.mark.parametrize("killed", ["MlflowClient.log_model_artifacts", "register_model"])
def test_a_kill_before_the_version_was_made_leaves_one_model(
    client: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    """In the middle of the upload, and between upload and registration."""
    folder = weights(tmp_path / "model", "A")
    with monkeypatch.context() as killing:
        killing.setattr(f"mlflow.{killed}", lambda *_, **__: _unreachable(None))
        with tracked_run(RunInfo("killed", "stage"), patience=0) as tracker:
            digest = register(tracker, folder)
    assert versions(client) == {}
    assert send_pending() == (1, 0)
    assert versions(client) == {"1": digest}
    run = find(client, "killed")
    models = client.search_logged_models([run.info.experiment_id])
    assert [(model.name, str(model.status), model.tags["checkpoint"]) for model in models] == [
        ("svd-test", "READY", digest)
    ]
    assert client.get_model_version("svd-test", "1").run_id == run.info.run_id
    assert run.data.params == {}


def test_a_stage_logs_the_options_that_it_depends_on(
    client: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run is continued under other options of other stages; it keeps the params that it has."""
    project = small_project.make_project(tmp_path, monkeypatch)

    def killed(context: StageContext) -> Report:
        raise KeyboardInterrupt

    small_project.use(monkeypatch, killed)
    with pytest.raises(KeyboardInterrupt):
        runner.run_preset_stage("orbits", load_preset("tiny"))
    small_project.use(monkeypatch, small_project.draw)
    later = load_preset("tiny", {"autoencoder.batch_size": 3})
    runner.run_preset_stage("orbits", later)
    (run,) = client.search_runs([client.get_experiment_by_name("stable-video-diffusion").experiment_id])
    assert run.info.status == "FINISHED"
    assert set(run.data.params) == {"seed", *(f"orbits.{name}" for name in type(later.orbits).model_fields)}
    assert run.data.params["orbits.objects"] == str(later.orbits.objects)
    kept = client.download_artifacts(run.info.run_id, "config/preset.json", str(project))
    assert json.loads(Path(kept).read_text()) == later.model_dump(mode="json")


def test_a_stage_knows_what_its_model_card_says_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_project.make_project(tmp_path, monkeypatch)
    known: list[StageContext] = []

    def work(context: StageContext) -> Report:
        known.append(context)
        return small_project.draw(context)

    small_project.use(monkeypatch, work)
    preset = load_preset("tiny")
    runner.run_preset_stage("orbits", preset)
    assert known[0].description == STAGES["orbits"].description
    assert known[0].options == {"seed": 0, "orbits": preset.orbits.model_dump(mode="json")}


def test_params_of_every_stage_are_named_by_its_sections() -> None:
    preset = load_preset("tiny")
    for stage in STAGES.values():
        names = flat_params(runner.stage_params(stage, preset))
        sections = stage.options
        assert names and all(any(f"{name}.".startswith(f"{section}.") for section in sections) for name in names)
        assert {section for section in sections if any(f"{n}.".startswith(f"{section}.") for n in names)} == {*sections}


def test_the_digest_reads_large_weights_piece_by_piece(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.truncate(300 << 20)
    tracemalloc.start()
    digest = checkpoint_digest(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20
    whole = hashlib.sha256((folder / "model.safetensors").read_bytes()).digest()
    assert digest == hashlib.sha256(whole).hexdigest()[:32]


def _unreachable(send: object) -> None:
    raise ConnectionError("MLflow is away")
