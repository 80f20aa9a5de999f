"""The Prefect flow of every stage, made from the table: bring inputs by hash, run the stage, hash and push the outputs.

Each flow is an attribute of this module, named after its stage (`image-pretraining` is `image_pretraining`), where
Prefect finds it by the entrypoints in prefect.yaml.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run

from flows.places import OUTPUTS, WORK, Place
from flows.prefect_flows import artifacts
from flows.prefect_flows.logs import shorten_mistakes
from flows.prefect_flows.output import leave_worker_pipe
from flows.recording import dvc as versioning
from flows.recording.results_store import store_root
from flows.recording.work import clear_work, delivered_work
from flows.running.runner import RunLink, run_stage
from flows.stages import STAGES, Stage
from flows.tracking.cost import read_cost
from flows.tracking.runs import Lineage
from svd.config.load import load_preset
from svd.core.disk import full_disk_in_one_line
from svd.core.errors import UserError
from svd.core.retries import Unreachable

StageFlow = Callable[..., dict[str, Any]]
HOUR = 3600
DVC_CACHE = Path(".dvc") / "cache"
leave_worker_pipe()
shorten_mistakes()


def _worth_retrying(task: Any, run: TaskRun, state: State) -> bool:
    """Return True but for a user's mistake, which a second try would repeat; a server that was away may be back."""
    cause = state.result(raise_on_failure=False)
    return not isinstance(cause, UserError) or isinstance(cause, Unreachable)


_retried_task = partial(
    task, retries=2, retry_delay_seconds=[5, 30], retry_condition_fn=_worth_retrying, persist_result=False
)


@_retried_task(name="stage", task_run_name="{stage}")
def _stage_task(
    stage: str, preset: str, parent: str | None, store: str | None, inputs: Sequence[Lineage]
) -> dict[str, Any]:
    link = RunLink(parent=parent, flow_run=flow_run.get_id())
    report = run_stage(stage, preset, link, store, parent is not None or store_root(store) is None, inputs)
    return {"metrics": dict(report.metrics), "summary": report.summary}


@_retried_task(name="push", task_run_name="push {stage}")
def _push_task(stage: str, outputs: list[Lineage]) -> None:
    """Push to the project's own DVC remote; a store has the outputs already."""
    versioning.push(outputs)


def run_stage_flow(
    stage: str,
    preset: str,
    parent: str | None = None,
    inputs: Sequence[dict[str, Any]] | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Do what a stage's flow does.

    parent: MLflow key of the pipeline's run; inputs: DVC hashes of the input folders, which are pulled when this
    machine lacks them; store: `s3://bucket/prefix` or a shared folder for inputs and outputs (default: `SVD_STORE`).
    Returns the stage's metrics, summary, cost and the hashes of its outputs, which are pushed to the store or else to
    the project's DVC remote, if there is one.
    Raises UserError for a mistake in the preset or a missing input.
    """
    result = _stage_task(stage, preset, parent, store, [Lineage(**item) for item in inputs or []])
    chosen = load_preset(preset)
    outputs = versioning.save_outputs(stage, chosen.name)
    if store_root(store) is None and versioning.has_remote():
        _push_task(stage, outputs)
    cost = asdict(read_cost(delivered_work(Place(chosen.name, stage))))
    artifacts.publish_artifacts(stage, chosen, result["metrics"], result["summary"])
    if parent is None:  # else the parent does it, when it has recorded the output
        clear_work(chosen, stage)
    return {"stage": stage, **result, "cost": cost, "outputs": [asdict(item) for item in outputs]}


def attribute(stage: Stage) -> str:
    """Return the name of the stage's flow in this module, as entrypoints give it."""
    return stage.name.replace("-", "_")


def _make_flow(stage: Stage) -> StageFlow:
    """Return the flow of a stage; its name, run name, time limit and description come from the stage's row."""

    def run(
        preset: str = "tiny",
        parent: str | None = None,
        inputs: list[dict[str, Any]] | None = None,
        store: str | None = None,
    ) -> dict[str, Any]:
        with full_disk_in_one_line(OUTPUTS, WORK, DVC_CACHE):
            return run_stage_flow(stage.name, preset, parent, inputs, store)

    run.__name__ = run.__qualname__ = attribute(stage)
    run.__doc__ = f"""{stage.description}

    preset: name or file; parent and inputs are set by `full-pipeline` (MLflow key, DVC hashes of the inputs);
    store: `s3://bucket/prefix` for inputs and outputs (default: SVD_STORE).
    Returns metrics and the DVC hashes of the outputs.
    """
    make: Callable[[StageFlow], StageFlow] = flow(
        name=stage.name,
        flow_run_name=f"{stage.name}-{{preset}}",
        timeout_seconds=stage.hours * HOUR,
        persist_result=True,
    )
    return make(run)


FLOWS = {stage.name: _make_flow(stage) for stage in STAGES.values()}
globals().update({attribute(stage): FLOWS[stage.name] for stage in STAGES.values()})
