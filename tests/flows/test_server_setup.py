"""Setting up a real Prefect server: its automations, pools, the queue of pipelines, and what they do."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL
from prefect.states import Pending, Running
from prefect.testing.utilities import prefect_test_harness

from flows.checking.waiting import say_why_it_waits
from flows.stack import server_setup


@pytest.fixture(scope="module")
def client() -> Iterator[SyncPrefectClient]:
    with prefect_test_harness(server_startup_timeout=240), get_client(sync_client=True) as client:
        yield client


@flow(name="waiting")
def waiting() -> None:
    """Stand for a stage whose pod doesn't start."""


def api() -> str:
    return str(PREFECT_API_URL.value())


def pod_event(run: UUID, diagnosis: str) -> None:
    """Report a pending pod as the observer of prefect-kubernetes does."""
    resource = {"prefect.resource.id": f"prefect.kubernetes.pod.{uuid4()}", "kubernetes.diagnosis": diagnosis}
    related = [{"prefect.resource.id": f"prefect.flow-run.{run}", "prefect.resource.role": "flow-run"}]
    emit_event("prefect.kubernetes.pod.pending", resource, related=related)


def await_state(client: SyncPrefectClient, run: UUID, name: str, diagnosis: str) -> State[Any]:
    """Report the pod until its run is in state `name`: the server takes a moment to know a new automation."""
    deadline = time.monotonic() + 90
    while True:
        pod_event(run, diagnosis)
        time.sleep(2)
        state = client.read_flow_run(run).state
        if state is not None and state.name == name:
            return state
        assert time.monotonic() < deadline, f"the run is still {state}"


def test_a_server_is_set_up_as_often_as_one_likes(client: SyncPrefectClient) -> None:
    server_setup.install_process_pools()
    server_setup.install_process_pools()
    made = server_setup.install_automations(api(), server_setup.POD_AUTOMATIONS)
    assert {"crash-silent-runs", "tell-missing-image"} <= set(made)
    assert server_setup.install_automations(api(), server_setup.POD_AUTOMATIONS) == []
    for _ in range(2):
        server_setup.limit_pipelines(api())
        assert client.read_work_queue_by_name("pipelines", "cpu").concurrency_limit == 1


@pytest.mark.parametrize(
    ("diagnosis", "name", "words"),
    [
        ("ImagePullError", "ImagePullError", "can't pull the pod's image"),
        ("Unschedulable.InsufficientResources", "Unschedulable", "No node takes the pod"),
        ("Unschedulable.Taint", "Unschedulable", "No node takes the pod"),
        ("Unschedulable", "Unschedulable", "No node takes the pod"),
    ],
)
def test_a_pod_that_cannot_start_says_why_in_the_state_of_its_run(
    client: SyncPrefectClient, diagnosis: str, name: str, words: str
) -> None:
    server_setup.install_automations(api(), server_setup.POD_AUTOMATIONS)
    run = client.create_flow_run(waiting, state=Pending(message="Kubernetes pod is pending.")).id
    state = await_state(client, run, name, diagnosis)
    assert state.is_pending() and words in str(state.message)


@pytest.mark.parametrize("name", ["Unschedulable", "InfrastructurePending"])
def test_what_the_observer_logged_becomes_the_message_of_a_waiting_run(client: SyncPrefectClient, name: str) -> None:
    """The observer sets InfrastructurePending again when it sees a second event of the pod."""
    run = client.create_flow_run(waiting, state=Pending(name=name, message="see the log"))
    line = {"level": 30, "timestamp": str(datetime.now(UTC)), "flow_run_id": str(run.id)}
    said = ("observer", "Pod is unschedulable: 1 Insufficient memory."), ("worker", "Creating Kubernetes job...")
    logs = [line | {"name": f"prefect.flow_runs.{who}", "message": message} for who, message in said]
    client.request("POST", "/logs/", json=logs).raise_for_status()
    deadline = time.monotonic() + 30
    while client.read_flow_run(run.id).state.message == "see the log":  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        say_why_it_waits(client, client.read_flow_run(run.id))
    state = client.read_flow_run(run.id).state
    assert state is not None and (state.name, state.message) == ("Unschedulable", said[0][1])
    client.set_flow_run_state(run.id, Running(), force=True)
    say_why_it_waits(client, client.read_flow_run(run.id))
    assert client.read_flow_run(run.id).state.is_running()  # type: ignore[union-attr]


def test_people_are_told_through_a_webhook_that_prefect_keeps_secret(client: SyncPrefectClient) -> None:
    told: list[dict[str, str]] = []

    class Webhook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            """Stay silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Webhook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/hooks/planted-token"
        server_setup.install_automations(api(), notify=server_setup.save_notification_block(url))
        outcome = {"model": "svd-text-to-video", "reason": "0.2 worse"}
        deadline = time.monotonic() + 90
        while not told and time.monotonic() < deadline:  # the server takes a moment to know a new automation
            emit_event("svd.gate.refused", {"prefect.resource.id": "svd.model.svd-text-to-video"}, payload=outcome)
            time.sleep(3)
    finally:
        server.shutdown()
    assert told and told[0] == {"text": "no promotion: svd-text-to-video\n0.2 worse"}
    blocks = client.request("POST", "/block_documents/filter", json={}).text
    assert server_setup.NOTIFICATION_BLOCK in blocks and "planted-token" not in blocks


def test_a_pool_that_an_engineer_edited_is_kept(client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for pool in client.read_work_pools():
        client.delete_work_pool(pool.name)
    assert server_setup.install_kubernetes_pools() == []
    template = client.read_work_pool("gpu").base_job_template
    template["variables"]["properties"]["memory_limit"]["default"] = "99Gi"
    client.update_work_pool("gpu", WorkPoolUpdate(base_job_template=template))
    monkeypatch.setenv("SVD_IMAGE_TAG", "2")
    assert server_setup.install_kubernetes_pools() == ["gpu"]

    def default(pool: str, variable: str) -> Any:
        return client.read_work_pool(pool).base_job_template["variables"]["properties"][variable]["default"]

    assert default("gpu", "memory_limit") == "99Gi" and default("gpu", "image").endswith("worker-gpu:dev")
    assert default("cpu", "image").endswith("worker-cpu:2")
    assert server_setup.install_kubernetes_pools(overwrite=True) == []
    assert default("gpu", "memory_limit") == "128Gi"


def test_a_pool_that_svd_did_not_make_is_kept(client: SyncPrefectClient) -> None:
    client.delete_work_pool("cpu")
    client.create_work_pool(WorkPoolCreate(name="cpu", type="process"))
    assert server_setup.install_kubernetes_pools() == ["cpu"]
    assert client.read_work_pool("cpu").type == "process"
