"""What every stage's flow does: bring inputs by hash, run the stage, hash and push the outputs, draw artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from prefect import task
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run

from flows import artifacts, versioning
from flows.runner import RunLink, run_stage
from flows.tracking import Lineage
from svd.presets import load_preset
from svd.stage import UserError


def _worth_retrying(task: Any, run: TaskRun, state: State) -> bool:
    """Everything but a user's mistake, which a second try would only repeat."""
    return not isinstance(state.result(raise_on_failure=False), UserError)


@task(
    name="stage",
    task_run_name="{stage}",
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=_worth_retrying,
    persist_result=False,
)
def _stage_task(stage: str, preset: str, parent: str | None) -> dict[str, Any]:
    link = RunLink(parent=parent, flow_run=flow_run.get_id())
    report = run_stage(stage, preset, link)
    return {"metrics": dict(report.metrics), "summary": report.summary}


def run_stage_flow(
    stage: str, preset: str, parent: str | None = None, inputs: Sequence[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The body of a stage's flow.

    parent: MLflow key of the pipeline's run; inputs: DVC hashes of the input folders, which are pulled when this
    machine lacks them. Returns the stage's metrics, summary and the hashes of its outputs, which are pushed when a
    DVC remote is set. Raises UserError for a mistake in the preset or a missing input.
    """
    if inputs:
        versioning.pull([Lineage(**item) for item in inputs])
    result = _stage_task(stage, preset, parent)
    outputs = versioning.save_outputs(stage)
    if versioning.has_remote():
        versioning.push(outputs)
    artifacts.publish(stage, load_preset(preset), result["metrics"], result["summary"])
    return {"stage": stage, **result, "outputs": [asdict(item) for item in outputs]}
