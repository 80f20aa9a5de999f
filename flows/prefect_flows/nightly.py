"""Every night: evaluate the current models again, write the report, and promote the candidate when it is not worse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from prefect import flow, get_run_logger
from prefect.events import emit_event
from prefect.runtime import flow_run

from flows.places import Place
from flows.prefect_flows.full_pipeline import full_pipeline
from flows.project import current_preset, pipeline_preset
from flows.recording import dvc as versioning
from flows.recording.results_store import fetch_inputs, store_root
from flows.stages import NIGHTLY, find_stage
from flows.tracking.promotion import promote
from svd.core.errors import UserError

EVALUATED, EVALUATION = "high-quality-finetuning", "ucf101-evaluation"


def _run_name() -> str:
    return f"nightly-evaluation-{flow_run.parameters.get('preset') or current_preset()}"


@flow(name="nightly-evaluation", flow_run_name=_run_name, persist_result=True)
def nightly_evaluation(preset: str | None = None, store: str | None = None) -> dict[str, Any]:
    """Run the evaluation stages whether or not something changed, then pass the candidate through the gate.

    preset: name in presets/; prefect.yaml gives the scheduled runs theirs (default: the one in params.yaml).
    Returns what `full-pipeline` returns, and under `promotion` what became of the candidate. A candidate that can't be
    judged (MLflow away, none registered) leaves the champion as it is; the log says why.
    """
    name = pipeline_preset(preset).name
    result = full_pipeline(preset=name, stages=list(NIGHTLY), force=True, store=store)
    return result | {"promotion": _promotion(name, store_root(store))}


def _promotion(preset: str, store: str | None) -> dict[str, Any]:
    logger, model = get_run_logger(), str(find_stage(EVALUATED).model)
    folders = {stage: Place(preset, stage).output for stage in (EVALUATED, EVALUATION)}
    try:
        if store:  # the stages ran on other nodes
            fetch_inputs(store, preset, folders)
        require_judged(preset, folders)
        outcome = promote(model, folders[EVALUATED], folders[EVALUATION])
    except (UserError, MlflowException) as error:
        logger.warning("no promotion: %s", error)
        return _refused({"model": model, "promoted": False, "reason": str(error)})
    logger.info("%s version %s: %s", outcome.model, outcome.version, outcome.reason)
    return asdict(outcome) if outcome.promoted else _refused(asdict(outcome))


def require_judged(preset: str, folders: Mapping[str, Path]) -> None:
    """Raise UserError when the evaluation is of another checkpoint: a training may have ended since."""
    inputs, outputs = versioning.lineage(EVALUATION, preset)
    recorded = {item.name: item.md5 for item in (*inputs, *outputs)}
    for stage, folder in folders.items():
        if versioning.hash_folder(folder).md5 != recorded.get(stage):
            raise UserError(f"{folder} is not what '{EVALUATION}' was recorded with; evaluate it again")


def _refused(outcome: dict[str, Any]) -> dict[str, Any]:
    """Tell Prefect that the champion stays, as the event `svd.gate.refused`; automations may send it to people."""
    emit_event("svd.gate.refused", {"prefect.resource.id": f"svd.model.{outcome['model']}"}, payload=outcome)
    return outcome
