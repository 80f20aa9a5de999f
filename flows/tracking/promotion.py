"""From candidate to champion: a registered model is promoted when its evaluation is not worse than the champion's.

The champion's evaluation is kept with the MLflow run that made it, so that every later candidate is compared with the
same clips (evaluation/frechet/gate.py). Aliases: `candidate` is what was trained last, `champion` what is served,
`best` the best champion so far. Candidates are compared with `best`: each may be worse than it by what the gate allows,
but a chain of champions, each a little worse than the one before, can't leave it behind.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from evaluation.frechet.gate import judge_candidate
from flows.tracking.mlflow_delivery import checkpoint_digest
from flows.tracking.runs import tracking_uri
from svd.core.errors import UserError

logger = logging.getLogger(__name__)
EVALUATION = "evaluation"


@dataclass(frozen=True)
class Promotion:
    """The outcome for a candidate: its version, whether it is the champion now, and why."""

    model: str
    version: str
    promoted: bool
    reason: str


def promote(model: str, checkpoint: Path, evaluation: Path) -> Promotion:
    """Point `champion` of the registered `model` at its candidate when the gate lets it through.

    checkpoint: the stage output that was evaluated; it must be the candidate's. evaluation: that evaluation's folder.
    Raises UserError when there is no candidate, when it is another checkpoint than the evaluated one, and for
    evaluations that can't be compared; MlflowException when MLflow is away.
    """
    client = mlflow.MlflowClient(tracking_uri())
    candidate, champion = _version(client, model, "candidate"), _version(client, model, "champion")
    if candidate is None:
        raise UserError(
            f"MLflow has no candidate of model '{model}'; run the stage that trains it, or `svd track flush`"
        )
    if candidate.tags.get("checkpoint") != checkpoint_digest(checkpoint):
        raise UserError(f"version {candidate.version} of '{model}' is not what lies in {checkpoint}; evaluate it first")
    if champion is not None and champion.version == candidate.version:
        return Promotion(model, str(candidate.version), True, "the candidate is the champion already")
    best = _version(client, model, "best") or champion
    with tempfile.TemporaryDirectory() as folder:
        old = Path(client.download_artifacts(best.run_id, EVALUATION, folder)) if best else None
        verdict = judge_candidate(evaluation, old)
    client.set_model_version_tag(model, candidate.version, "gate", "passed" if verdict.passed else "failed")
    client.set_model_version_tag(model, candidate.version, "gate.reason", verdict.reason[:4000])
    if verdict.passed:
        for path in sorted(evaluation.glob("*.json")):
            client.log_artifact(candidate.run_id, str(path), EVALUATION)
        client.set_registered_model_alias(model, "champion", candidate.version)
        if verdict.kernel is None or verdict.kernel.value < 0:
            client.set_registered_model_alias(model, "best", candidate.version)
    return Promotion(model, str(candidate.version), verdict.passed, verdict.reason)


def _version(client: mlflow.MlflowClient, model: str, alias: str) -> ModelVersion | None:
    """Return the version that `alias` points at; None when there is no such alias or model."""
    try:
        return client.get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
