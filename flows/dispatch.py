"""Run a stage's flow: in this process, or as a deployment in its work pool (a local process, a pod on a GPU node)."""

from __future__ import annotations

import importlib
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.runtime import deployment, flow_run

from flows.stages import find_stage
from svd.stage import UserError

StageFlow = Callable[..., dict[str, Any]]
POLL_SECONDS = 2
SERVER_AWAY_SECONDS = 900
MISTAKE = re.compile(r"exception: (User|Config)Error: ")  # as Prefect words a failed state
logger = logging.getLogger(__name__)


def stage_flow(stage: str) -> StageFlow:
    """The Prefect flow of a stage: flows/<stage>.py, a function of the same name."""
    name = find_stage(stage).name.replace("-", "_")
    return cast(StageFlow, getattr(importlib.import_module(f"flows.{name}"), name))


def dispatch(
    stage: str, preset: str, parent: str, inputs: list[dict[str, Any]], store: str | None = None
) -> dict[str, Any]:
    """Run `stage` where it belongs and return its flow's result.

    Raises what the child raised; for a deployment only UserError keeps its kind, everything else is a RuntimeError that
    names the child's flow run.

    preset: its name; parent: MLflow key of the pipeline's run; inputs: DVC hashes; store: where results are kept.

    A parent that runs as a deployment starts its children as deployments, so that GPU stages reach the pool `gpu`;
    `SVD_DISPATCH=inline` or `deployment` overrides this.
    """
    mode = os.environ.get("SVD_DISPATCH", "deployment" if deployment.get_id() else "inline")
    if mode not in ("inline", "deployment"):
        raise UserError(f"SVD_DISPATCH is '{mode}'; use 'inline' or 'deployment'")
    arguments = {"preset": preset, "parent": parent, "inputs": inputs, "store": store}
    if mode == "inline":
        return stage_flow(stage)(**arguments)
    return _run_child(stage, arguments)


def _run_child(stage: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Start the deployment `<stage>/<stage>` and wait; a retried parent adopts the child that it started before."""
    key = _idempotency_key(f"{flow_run.get_id()}:{stage}")
    started = run_deployment(f"{stage}/{stage}", parameters=arguments, idempotency_key=key, timeout=0)
    child = _wait(cast(FlowRun, started).id)
    if child.state is None or not child.state.is_completed():
        state = child.state.name if child.state else "unknown"
        message = child.state.message if child.state else ""
        kind = UserError if MISTAKE.search(message or "") else RuntimeError
        raise kind(f"stage '{stage}' ended {state} in flow run {child.id}: {message}")
    return cast(dict[str, Any], child.state.result())


def _wait(child: UUID) -> FlowRun:
    """The child once it has ended. A server that is away for a while (a restart) is waited for, up to 15 minutes."""
    last_answer = time.monotonic()
    while True:
        try:
            with get_client(sync_client=True) as client:
                run = client.read_flow_run(child)
            last_answer = time.monotonic()
            if run.state is not None and run.state.is_final():
                return run
        except httpx.TransportError as error:
            if time.monotonic() - last_answer > SERVER_AWAY_SECONDS:
                raise
            logger.warning("Prefect's server does not answer (%s), waiting for it", error)
        time.sleep(POLL_SECONDS)


def _idempotency_key(stem: str) -> str:
    """`stem:n`, counted up past children that ended badly: Prefect would hand those out again instead of a new run."""
    attempt = 0
    with get_client(sync_client=True) as client:
        while True:
            key = f"{stem}:{attempt}"
            found = client.read_flow_runs(
                flow_run_filter=FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key])),
                sort=FlowRunSort.START_TIME_DESC,
                limit=1,
            )
            state = found[0].state if found else None
            if state is None or not state.is_final() or state.is_completed():
                return key
            attempt += 1
