"""Why a run waits is what the log says of its present pod."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.states import Pending

from flows.checking.waiting import OBSERVER, WORKER, say_why_it_waits

PULL = "Image pull failed: registry:5000/svd:old Resolution: check it"


class Server:
    """Stands for Prefect's client: serves a log, keeps the states that are set."""

    def __init__(self, *lines: tuple[str, str]) -> None:
        began = datetime.now(UTC)
        self.logs = [
            SimpleNamespace(name=name, message=message, timestamp=began + timedelta(seconds=number))
            for number, (name, message) in enumerate(lines)
        ]
        self.states: list[Any] = []

    def read_logs(self, *_: Any, **__: Any) -> list[Any]:
        return self.logs[::-1]

    def set_flow_run_state(self, _: Any, state: Any, force: bool) -> None:
        self.states.append(state)


@pytest.mark.parametrize(("again", "states"), [(False, ["ImagePullError"]), (True, [])])
def test_what_held_up_an_earlier_pod_is_not_said_of_the_next_one(again: bool, states: list[str]) -> None:
    taken = (WORKER, "Worker 'w' submitting flow run 'x'"), (WORKER, "Creating Kubernetes job...")
    server = Server(*taken, (OBSERVER, PULL), *(taken if again else ()))
    run = FlowRun(flow_id=uuid4(), state=Pending(name="InfrastructurePending"))
    say_why_it_waits(cast(SyncPrefectClient, server), run)
    assert [state.name for state in server.states] == states
