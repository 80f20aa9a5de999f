"""What a pipeline does with a child that ended: takes its result, starts a crashed one again, fails with it."""

from __future__ import annotations

from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed, Crashed, Failed

from flows.prefect_flows import dispatch


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
    answers = iter([httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), "here"])

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
