"""Run a stage's flow: in this process, or as a deployment in its work pool (a local process, a pod on a GPU node)."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.runtime import deployment, flow_run

from flows.prefect_flows.stage_flows import FLOWS, StageFlow
from flows.stages import find_stage
from svd.core.errors import UserError

T = TypeVar("T")
POLL_SECONDS = 2
SERVER_AWAY_SECONDS = 900
RESTARTS = 2
MISTAKE = re.compile(r"exception: (User|Config)Error: ")  # as Prefect words a failed state
logger = logging.getLogger(__name__)


def stage_flow(stage: str) -> StageFlow:
    """Return the Prefect flow of a stage; raises UserError for an unknown one."""
    return FLOWS[find_stage(stage).name]


def dispatch(
    stage: str, preset: str, parent: str, inputs: list[dict[str, Any]], store: str | None = None
) -> dict[str, Any]:
    """Run `stage` where it belongs and return its flow's result.

    preset: its name; parent: MLflow key of the pipeline's run; inputs: DVC hashes; store: where results are kept.

    A parent that runs as a deployment starts its children as deployments, so that GPU stages reach the pool `gpu`;
    `SVD_DISPATCH=inline` or `deployment` overrides this. Raises what the child raised; of a deployment only UserError
    keeps its kind, everything else is a RuntimeError that names the child's flow run.
    """
    mode = os.environ.get("SVD_DISPATCH", "deployment" if deployment.get_id() else "inline")
    if mode not in ("inline", "deployment"):
        raise UserError(f"SVD_DISPATCH is '{mode}'; use 'inline' or 'deployment'")
    arguments = {"preset": preset, "parent": parent, "inputs": inputs, "store": store}
    if mode == "inline":
        return stage_flow(stage)(**arguments)
    return _run_child(stage, arguments)


def _run_child(stage: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run the deployment `<stage>/<stage>` to its end; a retried parent adopts the child that it started before.

    A child that crashed (its process, worker or node died; not an exception of the stage) is started again, at most
    twice: the new one takes up the stage's work in progress.
    """
    child = _start_child(stage, arguments)
    for _ in range(RESTARTS):
        if child.state is None or not child.state.is_crashed():
            break
        logger.warning(
            "stage '%s' crashed in flow run %s (%s); starting it again", stage, child.id, child.state.message
        )
        child = _start_child(stage, arguments)
    if child.state is None or not child.state.is_completed():
        state = child.state.name if child.state else "unknown"
        message = child.state.message if child.state else ""
        kind = UserError if MISTAKE.search(message or "") else RuntimeError
        raise kind(f"stage '{stage}' ended {state} in flow run {child.id}: {message}")
    return cast(dict[str, Any], child.state.result())


def _start_child(stage: str, arguments: dict[str, Any]) -> FlowRun:
    """Start the child, or find the one that this parent started before, and wait until it has ended."""
    key = _patiently(lambda: _idempotency_key(f"{flow_run.get_id()}:{stage}"))
    started = _patiently(
        lambda: run_deployment(f"{stage}/{stage}", parameters=arguments, idempotency_key=key, timeout=0)
    )
    child = cast(FlowRun, started)
    while child.state is None or not child.state.is_final():
        time.sleep(POLL_SECONDS)
        child = _patiently(partial(_read, child.id))
    return child


def _read(run: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run)


def _patiently(ask: Callable[[], T]) -> T:
    """Return what Prefect's server answers; one that is away or fails itself (status 5xx) is asked for 15 minutes."""
    deadline, warned = time.monotonic() + SERVER_AWAY_SECONDS, False
    while True:
        try:
            return ask()
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            refused = isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error
            if refused or time.monotonic() > deadline:
                raise
            if not warned:
                logger.warning("Prefect's server does not answer (%s), waiting for it", error)
                warned = True
            time.sleep(POLL_SECONDS)


def _idempotency_key(stem: str) -> str:
    """Return `stem:n`, counted up past children that ended badly: Prefect would return those instead of a new run."""
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
