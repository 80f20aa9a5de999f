"""Setting up a real Prefect server: its automations and the queue of pipelines."""

from __future__ import annotations

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from flows.stack import server_setup


def test_a_server_is_set_up_as_often_as_one_likes() -> None:
    with prefect_test_harness(server_startup_timeout=240), get_client(sync_client=True) as client:
        api = str(PREFECT_API_URL.value())
        client.create_work_pool(WorkPoolCreate(name="cpu", type="process"))
        for made in (["crash-silent-runs"], []):
            server_setup.limit_pipelines(api)
            assert server_setup.install_automations(api) == made
            assert client.read_work_queue_by_name("pipelines", "cpu").concurrency_limit == 1
