"""Promotion in a real registry (MLflow on SQLite): first model, better, worse, another checkpoint, no candidate."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import pytest

from flows.tracking.mlflow_delivery import checkpoint_digest
from flows.tracking.promotion import promote
from flows.tracking.runs import tracking_uri
from svd.core.errors import UserError
from svd.core.files import write_json

MODEL = "svd-text-to-video"


def score(subject: str, kernel: float) -> dict[str, object]:
    replicates = [kernel * (1 + 0.01 * (block - 1.5)) for block in range(4)]
    distance = {"kernel": {"unbiased": kernel}, "kernel_replicates": replicates, "frechet": {"value": 100 * kernel}}
    distance |= {"replicates": [100 * value for value in replicates], "real": 101, "generated": 101}
    return {"subject": subject, "seed": 0, "distance": distance}


def evaluation(folder: Path, kernel: float) -> Path:
    folder.mkdir()
    scores = [score("generated", kernel), score("noise", 2.0)]
    values = {"dataset": "ucf101", "metric": "fvd", "protocol": {"digest": "p"}, "scores": scores}
    write_json(folder / "result.json", values)
    return folder


def train(folder: Path, number: int) -> Path:
    """A checkpoint, registered as the candidate as `MlflowTracker.register_model` does it."""
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "unet" / "weights.safetensors").write_bytes(bytes([number]) * 100)
    client = mlflow.MlflowClient(tracking_uri())
    found = client.get_experiment_by_name("training")
    location = (folder.parent / "artifacts").as_uri()
    experiment = found.experiment_id if found else client.create_experiment("training", artifact_location=location)
    run = client.create_run(experiment)
    if not found:
        client.create_registered_model(MODEL)
    version = client.create_model_version(MODEL, f"{location}/{number}", run.info.run_id).version
    client.set_model_version_tag(MODEL, version, "checkpoint", checkpoint_digest(folder))
    client.set_registered_model_alias(MODEL, "candidate", version)
    return folder


@pytest.fixture(scope="module")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database that is made once; making one takes seconds."""
    path = tmp_path_factory.mktemp("registry") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_registered_models()
    return path


@pytest.fixture
def checkpoint(tmp_path: Path, empty_registry: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(empty_registry, tmp_path)}")
    return train(tmp_path / "checkpoint", 1)


def test_candidates_become_champions_only_when_they_are_not_worse(checkpoint: Path, tmp_path: Path) -> None:
    client = mlflow.MlflowClient(tracking_uri())
    first = promote(MODEL, checkpoint, evaluation(tmp_path / "first", 1.0))
    assert first.promoted and "no champion yet" in first.reason
    assert promote(MODEL, checkpoint, tmp_path / "first").reason == "the candidate is the champion already"

    train(checkpoint, 2)
    worse = promote(MODEL, checkpoint, evaluation(tmp_path / "worse", 1.5))
    assert not worse.promoted and "allowed" in worse.reason
    assert client.get_model_version_by_alias(MODEL, "champion").version in (1, "1")
    assert client.get_model_version(MODEL, "2").tags["gate"] == "failed"

    train(checkpoint, 3)
    assert promote(MODEL, checkpoint, evaluation(tmp_path / "better", 0.8)).promoted
    assert client.get_model_version_by_alias(MODEL, "champion").version in (3, "3")
    assert client.get_model_version(MODEL, "3").tags["gate"] == "passed"


def test_champions_cannot_get_worse_step_by_step(checkpoint: Path, tmp_path: Path) -> None:
    """Each is within the tolerance of the one before; only the first is within that of the best."""
    client = mlflow.MlflowClient(tracking_uri())
    promoted = []
    for number, kernel in enumerate((1.0, 1.04, 1.08, 1.12)):
        if number:
            train(checkpoint, number + 1)
        promoted.append(promote(MODEL, checkpoint, evaluation(tmp_path / str(number), kernel)).promoted)
    assert promoted == [True, True, False, False]
    aliases = client.get_registered_model(MODEL).aliases
    assert (str(aliases["best"]), str(aliases["champion"])) == ("1", "2")


def test_a_model_that_loses_against_noise_never_leads(checkpoint: Path, tmp_path: Path) -> None:
    outcome = promote(MODEL, checkpoint, evaluation(tmp_path / "bad", 3.0))
    assert not outcome.promoted and "noise" in outcome.reason
    assert not mlflow.MlflowClient(tracking_uri()).get_registered_model(MODEL).aliases.get("champion")


def test_an_evaluation_of_another_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "unet" / "weights.safetensors").write_bytes(b"trained again")
    with pytest.raises(UserError, match="is not what lies in"):
        promote(MODEL, checkpoint, evaluation(tmp_path / "first", 1.0))


def test_without_a_candidate(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no candidate of model 'other'"):
        promote("other", checkpoint, evaluation(tmp_path / "first", 1.0))
