"""Run a stage's flow: in this process, or as a deployment in its work pool (a local process, a pod on a GPU node)."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, cast
from uuid import UUID

import httpx
from botocore.exceptions import BotoCoreError
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment, flow_run
from prefect.states import AwaitingRetry

from flows.checking.placement import gpus_here, refuse_misplaced
from flows.checking.waiting import say_why_it_waits
from flows.prefect_flows.stage_flows import FLOWS, StageFlow
from flows.stages import find_stage
from svd.config import Preset
from svd.config.load import load_preset
from svd.core.errors import UserError

T = TypeVar("T")
POLL_SECONDS = 2
SERVER_AWAY_SECONDS = 900
AWAY = (httpx.TransportError, ConnectionError, TimeoutError, BotoCoreError)
RESTARTS = 2
STUCK_SECONDS = 900
MISTAKE = re.compile(r"exception: (User|Config)Error: ")  # as Prefect words a failed state
EXPIRED = re.compile(r"exception: LeaseExpired: ")
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
    arguments = {"preset": preset, "parent": parent, "inputs": inputs, "store": store}
    return _run_child(stage, arguments) if _as_deployments() else stage_flow(stage)(**arguments)


def _as_deployments() -> bool:
    """Return whether stages run as deployments, not in this process; raises UserError for a wrong SVD_DISPATCH."""
    mode = os.environ.get("SVD_DISPATCH", "deployment" if deployment.get_id() else "inline")
    if mode not in ("inline", "deployment"):
        raise UserError(f"SVD_DISPATCH is '{mode}'; use 'inline' or 'deployment'")
    return mode == "deployment"


def refuse_unplaceable(preset: Preset, names: Sequence[str]) -> None:
    """Raise UserError, before the first stage, when one of them could not be placed: nodes, devices, pool, deployment.

    What the nodes behind a pool have isn't known here: a pod that no node takes says so in its run's state.
    """
    if not _as_deployments():
        refuse_misplaced(preset, names, gpus_here() if _wants_several(preset, names) else None)
        return
    refuse_misplaced(preset, names)
    for name in names:
        _patiently(partial(_require_pool, name))


def _wants_several(preset: Preset, names: Sequence[str]) -> bool:
    """Return whether a training's devices are not one: only then is it worth to import torch and count."""
    return any(find_stage(name).distributed and preset.compute.of(name).devices != 1 for name in names)


def _require_pool(stage: str) -> None:
    """Raise UserError when Prefect lacks the stage's deployment or the pool that this one runs in."""
    with get_client(sync_client=True) as client:
        try:
            pool = client.read_deployment_by_name(f"{stage}/{stage}").work_pool_name
        except ObjectNotFound:
            message = f"Prefect has no deployment '{stage}/{stage}'; run `prefect deploy --all` or `svd platform init`"
            raise UserError(message) from None
        try:
            client.read_work_pool(pool or find_stage(stage).pool)
        except ObjectNotFound:
            message = f"Prefect has no work pool '{pool}', where stage '{stage}' runs; run `svd platform init`"
            raise UserError(message) from None


def _run_child(stage: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run the deployment `<stage>/<stage>` to its end; a retried parent adopts the child that it started before.

    A child that crashed (its process, worker or node died; not an exception of the stage), or whose lease expired while
    the store was away, is started again, at most twice: the new one takes up the stage's work in progress.
    """
    child = _start_child(stage, arguments)
    for _ in range(RESTARTS):
        if not _is_worth_a_restart(child):
            break
        reason = child.state.message if child.state else ""
        logger.warning("stage '%s' was cut off in flow run %s (%s); starting it again", stage, child.id, reason)
        child = _start_child(stage, arguments)
    if child.state is None or not child.state.is_completed():
        state = child.state.name if child.state else "unknown"
        message = child.state.message if child.state else ""
        kind = UserError if MISTAKE.search(message or "") else RuntimeError
        raise kind(f"stage '{stage}' ended {state} in flow run {child.id}: {message}")
    return cast(dict[str, Any], _patiently(child.state.result))


def _start_child(stage: str, arguments: dict[str, Any]) -> FlowRun:
    """Start the child, or find the one that this parent started before, and wait until it has ended."""
    key = _patiently(lambda: _idempotency_key(f"{flow_run.get_id()}:{stage}"))
    start = partial(run_deployment, f"{stage}/{stage}", job_variables=_job_variables(stage, arguments["preset"]))
    started = _patiently(lambda: start(parameters=arguments, idempotency_key=key, timeout=0))
    child = cast(FlowRun, started)
    since = time.monotonic()
    while child.state is None or not child.state.is_final():
        time.sleep(POLL_SECONDS)
        before, child = child, _patiently(partial(_read, child.id))
        if before.state != child.state:
            since = time.monotonic()
        if _is_stuck(child, time.monotonic() - since):
            logger.warning("no worker started flow run %s of stage '%s', scheduling it again", child.id, stage)
            _patiently(partial(_schedule_again, child.id))
    return child


def _is_worth_a_restart(child: FlowRun) -> bool:
    state = child.state
    return state is not None and (state.is_crashed() or bool(EXPIRED.search(state.message or "")))


def _job_variables(stage: str, preset: str) -> dict[str, Any]:
    """Return what the preset changes of the pod: a GPU for each device of a training that wants more than its row."""
    row = find_stage(stage)
    if row.pool != "gpu" or not row.distributed:
        return {}
    devices = load_preset(preset).compute.of(stage).devices
    return {"gpus": devices} if isinstance(devices, int) and devices > row.pod.gpus else {}


def _is_stuck(child: FlowRun, seconds: float) -> bool:
    """Return whether a worker took the run and died before it started it. (A pod that waits is InfrastructurePending.)

    seconds: for how long it is in its state, by this machine's own clock; the server's may be another one. The server's
    automation finds such runs as well, unless the server was away when it should have.
    """
    return child.state is not None and child.state.name in ("Pending", "Submitting") and seconds > STUCK_SECONDS


def _schedule_again(run: UUID) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, AwaitingRetry(), force=True)


def _read(run: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(run)
        say_why_it_waits(client, found)
        return found


def _patiently(ask: Callable[[], T]) -> T:
    """Return what a server answers; one that is away or fails itself (status 5xx) is asked for 15 minutes.

    Prefect's, or the store that keeps the results of runs.
    """
    deadline, warned = time.monotonic() + SERVER_AWAY_SECONDS, False
    while True:
        try:
            return ask()
        except (*AWAY, httpx.HTTPStatusError) as error:
            refused = isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error
            if refused or time.monotonic() > deadline:
                raise
            if not warned:
                logger.warning("a server does not answer (%s), waiting for it", error)
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
