"""Every night: evaluate the current models again, write the report, and promote the candidate when it is not worse."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mlflow.exceptions import MlflowException
from prefect import flow, get_run_logger

from flows.prefect_flows.full_pipeline import full_pipeline, select_preset
from flows.recording.results_store import fetch_inputs, store_root
from flows.runner import output_folder
from flows.stages import NIGHTLY, find_stage
from flows.tracking.promotion import promote
from svd.core.errors import UserError

EVALUATED, EVALUATION = "high-quality-finetuning", "ucf101-evaluation"


@flow(name="nightly-evaluation", flow_run_name="nightly-evaluation-{preset}", persist_result=True)
def nightly_evaluation(preset: str | None = None, store: str | None = None) -> dict[str, Any]:
    """Run the evaluation stages whether or not something changed, then pass the candidate through the gate.

    Returns what `full-pipeline` returns, and under `promotion` what became of the candidate. A candidate that can't be
    judged (MLflow away, none registered) leaves the champion as it is and is told in the log.
    """
    result = full_pipeline(preset=preset, stages=list(NIGHTLY), force=True, store=store)
    return result | {"promotion": _promotion(preset, store_root(store))}


def _promotion(name: str | None, store: str | None) -> dict[str, Any]:
    logger, preset = get_run_logger(), select_preset(name)
    model = str(find_stage(EVALUATED).model)
    folders = {stage: output_folder(preset, stage) for stage in (EVALUATED, EVALUATION)}
    try:
        if store:  # the stages ran on other nodes
            fetch_inputs(store, preset.name, folders)
        outcome = promote(model, folders[EVALUATED], folders[EVALUATION])
    except (UserError, MlflowException) as error:
        logger.warning("no promotion: %s", error)
        return {"model": model, "promoted": False, "reason": str(error)}
    logger.info("%s version %s: %s", outcome.model, outcome.version, outcome.reason)
    return asdict(outcome)
