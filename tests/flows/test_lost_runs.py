"""Runs that lost their process: begun again by `svd stack up`, or by the automations of Prefect's server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling, Crashed, Pending, Running, State, Submitting
from prefect.testing.utilities import prefect_test_harness

from flows.stack import server_setup
from flows.stack.lost_runs import schedule_lost_runs
from flows.stack.server_setup import AUTOMATIONS, send

PIPELINES = ("full-pipeline", "nightly-evaluation")


@flow(name="any")
def nothing() -> None:
    """Do nothing."""


@pytest.fixture(scope="module")
def client() -> Iterator[SyncPrefectClient]:
    with prefect_test_harness(server_startup_timeout=240), get_client(sync_client=True) as client:
        for pool in ("cpu", "gpu"):
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        server_setup.install_automations(str(PREFECT_API_URL.value()))
        yield client


def run_of(client: SyncPrefectClient, state: State[Any], pool: str = "cpu", deployment: str | None = None) -> UUID:
    """A run of a deployment (default: of a stage) in a pool, in this state."""
    made = client.create_deployment(
        client.create_flow(nothing), deployment or f"stage-{pool}", work_pool_name=pool, entrypoint="x.py:nothing"
    )
    run = client.create_flow_run_from_deployment(made)
    client.set_flow_run_state(run.id, state, force=True)
    return run.id


def state_of(client: SyncPrefectClient, run: UUID) -> str:
    found: FlowRun = client.read_flow_run(run)
    assert found.state and found.state.name
    return found.state.name


def test_runs_without_a_process_are_scheduled_again(client: SyncPrefectClient) -> None:
    api = str(PREFECT_API_URL.value())
    lost = [run_of(client, state) for state in (Pending(), Submitting(), Running())]
    living, elsewhere, cancelled = (
        run_of(client, Running()),
        run_of(client, Running(), "gpu"),
        run_of(client, Running()),
    )
    client.update_flow_run(cancelled, infrastructure_pid="1")  # else there is nothing to wait for
    client.set_flow_run_state(cancelled, Cancelling(), force=True)
    ended = run_of(client, Crashed())
    assert state_of(client, cancelled) == "Cancelling"
    assert schedule_lost_runs(api, "cpu", {str(living)}) == 4
    assert {state_of(client, run) for run in lost} == {"AwaitingRetry"}
    assert [state_of(client, run) for run in (cancelled, living, elsewhere, ended)] == [
        "Cancelled", "Running", "Running", "Crashed",
    ]  # fmt: skip
    assert schedule_lost_runs(api, "cpu", {str(living)}) == 0


def becomes(client: SyncPrefectClient, run: UUID, state: str, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while state_of(client, run) != state and time.monotonic() < deadline:
        time.sleep(0.5)
    return state_of(client, run) == state


@pytest.mark.parametrize("deployment", PIPELINES)
def test_a_crashed_pipeline_is_started_again_but_no_stage(client: SyncPrefectClient, deployment: str) -> None:
    stage = run_of(client, Crashed(message="signal 9"))
    pipeline = run_of(client, Crashed(message="signal 9"), deployment=deployment)
    assert becomes(client, pipeline, "AwaitingRetry")
    assert state_of(client, stage) == "Crashed", "its pipeline does that"


def install(name: str, seconds: int) -> None:
    """Install one of our automations with a shorter time."""
    described = yaml.safe_load(AUTOMATIONS.read_text())["automations"]
    (automation,) = [found for found in described if found["name"] == name]
    automation["trigger"]["within"] = seconds
    send(f"{PREFECT_API_URL.value()}/automations/", automation)


def test_a_run_that_falls_silent_has_crashed(client: SyncPrefectClient) -> None:
    install("crash-silent-runs", 10)
    run = run_of(client, Running())
    emit_event("prefect.flow-run.heartbeat", {"prefect.resource.id": f"prefect.flow-run.{run}"})
    assert becomes(client, run, "Crashed")


def test_a_run_that_nobody_starts_is_scheduled_again(client: SyncPrefectClient) -> None:
    install("reschedule-stuck-submissions", 10)
    taken, submitting, started = (run_of(client, state) for state in (Pending(), Submitting(), Submitting()))
    client.set_flow_run_state(started, Running(), force=True)
    assert becomes(client, taken, "AwaitingRetry") and becomes(client, submitting, "AwaitingRetry")
    assert state_of(client, started) == "Running"
