"""What a pipeline does with a child that ended: takes its result, starts a crashed one again, fails with it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
import yaml
from botocore.exceptions import EndpointConnectionError
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import (
    AwaitingRetry,
    Completed,
    Crashed,
    Failed,
    InfrastructurePending,
    Pending,
    Running,
    Submitting,
)

from flows.prefect_flows import dispatch

ROOT = Path(__file__).parents[2]


def children(monkeypatch: pytest.MonkeyPatch, *states: State) -> list[str]:
    """Let children end in these states, one after the other; returns the list of stages that were started."""
    started: list[str] = []

    def start(stage: str, arguments: dict[str, str]) -> FlowRun:
        started.append(stage)
        return FlowRun(id=uuid4(), flow_id=uuid4(), state=states[len(started) - 1])

    monkeypatch.setattr(dispatch, "_start_child", start)
    return started


def test_a_crashed_child_is_started_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    started = children(monkeypatch, Crashed(message="node lost"), Completed(data={"stage": "orbits"}))
    assert dispatch._run_child("orbits", {}) == {"stage": "orbits"}
    assert len(started) == 2 and "node lost" in caplog.text


def test_a_child_whose_lease_expired_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    expired = State(type="FAILED", message="Flow run encountered an exception: LeaseExpired: lease of 'orbits' lost")
    started = children(monkeypatch, expired, Completed(data={"stage": "orbits"}))
    assert dispatch._run_child("orbits", {}) == {"stage": "orbits"} and len(started) == 2


def test_a_child_that_crashes_every_time_fails_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    started = children(monkeypatch, *[Crashed(message="out of memory")] * 5)
    with pytest.raises(RuntimeError, match=r"stage 'orbits' ended Crashed in flow run .*: out of memory"):
        dispatch._run_child("orbits", {})
    assert len(started) == 3


def test_a_failed_child_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started = children(monkeypatch, Failed(message="no mesh.glb"))
    with pytest.raises(RuntimeError, match=r"ended Failed in flow run .*: no mesh\.glb"):
        dispatch._run_child("orbits", {})
    assert len(started) == 1


def test_a_server_that_is_away_is_waited_for_but_not_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0.01)
    store = EndpointConnectionError(endpoint_url="http://s3:9000")
    answers = iter([httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), store, "here"])

    def ask() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def refuse() -> None:
        raise httpx.ConnectError("refused")

    assert dispatch._patiently(ask) == "here"
    monkeypatch.setattr(dispatch, "SERVER_AWAY_SECONDS", 0.05)
    with pytest.raises(httpx.ConnectError, match="refused"):
        dispatch._patiently(refuse)


def test_a_server_that_fails_is_asked_again_but_one_that_refuses_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0.01)
    request = httpx.Request("GET", "http://prefect:4200/api/flow_runs/1")
    codes = iter([500, 503, 200, 404])

    def ask() -> int:
        return httpx.Response(next(codes), request=request).raise_for_status().status_code

    assert dispatch._patiently(ask) == 200, "its database was too busy"
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        dispatch._patiently(ask)


def test_a_pod_gets_a_gpu_for_each_device_of_its_training(tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "presets" / "tiny.yaml").read_text())
    values["compute"] = {"training": {"devices": 4}, "image_to_video": {"devices": 1}}
    preset = tmp_path / "several.yaml"
    preset.write_text(yaml.safe_dump(values))
    assert dispatch._job_variables("video-pretraining", str(preset)) == {"gpus": 4}
    assert dispatch._job_variables("image-to-video", str(preset)) == {}  # its row asks for one
    assert dispatch._job_variables("curation", str(preset)) == {}
    assert dispatch._job_variables("video-pretraining", str(ROOT / "presets" / "tiny.yaml")) == {}


@pytest.mark.parametrize(
    ("state", "minutes", "stuck"),
    [
        (Pending(), 20, True),
        (Submitting(), 20, True),
        (Submitting(), 5, False),
        (InfrastructurePending(), 600, False),
        (Running(), 600, False),
    ],
)
def test_a_child_that_no_worker_starts_is_noticed(state: State, minutes: int, stuck: bool) -> None:
    assert dispatch._is_stuck(FlowRun(id=uuid4(), flow_id=uuid4(), state=state), 60 * minutes) is stuck


def test_a_servers_clock_makes_no_child_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is scheduled again while its worker begins it would run twice."""
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0)
    long_ago = datetime.now(UTC) - timedelta(hours=1)  # as the server's clock, which is late, has it
    pending = Pending(timestamp=long_ago)
    run = FlowRun(id=uuid4(), flow_id=uuid4(), state=pending)
    states = iter([pending, Submitting(timestamp=long_ago), Running(), Completed(data={})])
    monkeypatch.setattr(dispatch, "_idempotency_key", lambda stem: stem)
    monkeypatch.setattr(dispatch, "run_deployment", lambda *given, **named: run)
    monkeypatch.setattr(dispatch, "_read", lambda found: run.model_copy(update={"state": next(states)}))
    scheduled: list[object] = []
    monkeypatch.setattr(dispatch, "_schedule_again", scheduled.append)
    child = dispatch._start_child("orbits", {"preset": "tiny"})
    assert child.state is not None and child.state.is_completed() and scheduled == []


def test_a_stuck_child_is_scheduled_again_and_awaited(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0)
    monkeypatch.setattr(dispatch, "STUCK_SECONDS", -1)
    run = FlowRun(id=uuid4(), flow_id=uuid4(), state=Submitting())
    states = iter([Submitting(), AwaitingRetry(), Running(), Completed(data={})])
    scheduled: list[object] = []
    monkeypatch.setattr(dispatch, "_idempotency_key", lambda stem: stem)
    monkeypatch.setattr(dispatch, "run_deployment", lambda *given, **named: run)
    monkeypatch.setattr(dispatch, "_read", lambda found: run.model_copy(update={"state": next(states)}))
    monkeypatch.setattr(dispatch, "_schedule_again", scheduled.append)
    child = dispatch._start_child("orbits", {"preset": "tiny"})
    assert child.state is not None and child.state.is_completed()
    assert scheduled == [run.id] and "no worker started flow run" in caplog.text
