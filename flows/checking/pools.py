"""Runs `platform-check` in a pool from outside and reads what it found, or why it never started."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterType
from prefect.client.schemas.objects import Artifact, FlowRun
from prefect.deployments import run_deployment

from flows.checking.finding import Finding
from flows.checking.waiting import say_why_it_waits
from svd.core.errors import UserError

POLL_SECONDS = 1


@dataclass
class PoolCheck:
    """The check of one pool: its flow run, the states it went through, and the findings once it has ended."""

    pool: str
    run: FlowRun
    states: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Return whether every probe passed."""
        return bool(self.findings) and all(finding.passed for finding in self.findings)


def check_pools(pools: list[str], seconds: float, say: Callable[[str, str], None]) -> list[PoolCheck]:
    """Run the check in all pools at once, for at most `seconds`; `say(pool, state)` is called for every new state.

    A run that never started, failed or took too long has a single finding, `start`, that says so. Raises UserError when
    a pool has no deployment.
    """
    checks = [PoolCheck(pool, _start(pool)) for pool in pools]
    deadline = time.monotonic() + seconds
    while any(not check.findings for check in checks):
        for check in (c for c in checks if not c.findings):
            _look(check, say)
            if not check.findings and time.monotonic() > deadline:
                _cancel(check)
        time.sleep(POLL_SECONDS)
    return checks


def _start(pool: str) -> FlowRun:
    try:
        return cast(FlowRun, run_deployment(f"platform-check/check-{pool}", timeout=0))
    except ValueError:
        raise UserError(f"Prefect has no deployment platform-check/check-{pool}; run `svd platform init`") from None


def _look(check: PoolCheck, say: Callable[[str, str], None]) -> None:
    """Read the run's state, tell it when it is new, and take the findings when the run has ended."""
    with get_client(sync_client=True) as client:
        check.run = client.read_flow_run(check.run.id)
        say_why_it_waits(client, check.run)
        state = check.run.state
        text = f"{state.name}: {state.message}" if state and state.message else str(state and state.name)
        if text not in check.states:
            check.states.append(text)
            say(check.pool, text)
        if state is None or not state.is_final():
            return
        if not state.is_completed():
            check.findings = [Finding("start", False, text)]
            return
        wanted = ArtifactFilter(  # the result of the run is an artifact, too
            flow_run_id=ArtifactFilterFlowRunId(any_=[check.run.id]), type=ArtifactFilterType(any_=["table"])
        )
        found = client.read_artifacts(artifact_filter=wanted)
    check.findings = [Finding("start", True, "ran"), *(Finding(**row) for artifact in found for row in _rows(artifact))]


def _rows(artifact: Artifact) -> list[dict[str, Any]]:
    """Return the rows of a table artifact, which the server keeps as JSON or as its text."""
    rows: list[dict[str, Any]] = json.loads(artifact.data) if isinstance(artifact.data, str) else artifact.data
    return rows


def _cancel(check: PoolCheck) -> None:
    """Give a run up, and keep the last state it was seen in."""
    from prefect.states import Cancelling

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(check.run.id, Cancelling(message="`svd platform check` gave it up"))
    check.findings = [Finding("start", False, f"not done in time; last seen {check.states[-1]}")]
