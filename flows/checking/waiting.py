"""Why a pod doesn't start, in the state of its flow run.

infra/prefect/pod-automations.yaml puts a run whose pod finds no node or no image into a state of that name. What each
node lacks, or which image it is, stands only in the run's log, where the worker's observer writes it.
"""

from __future__ import annotations

import re

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import LogSort
from prefect.states import Pending

PENDING = "InfrastructurePending"
# As the observer's lines begin.
CAUSES = {"Image pull failed": "ImagePullError", "Pod is unschedulable": "Unschedulable"}
OBSERVER, WORKER = "prefect.flow_runs.observer", "prefect.flow_runs.worker"
SUBMITTING = re.compile(r"Worker '.*' submitting flow run")


def say_why_it_waits(client: SyncPrefectClient, run: FlowRun) -> None:
    """Make the observer's last line about the pod of a waiting `run` the message of its state, unless it is.

    Lines from before a worker took the run last are about the pod of an earlier attempt: what they say may have passed,
    and a run is given up five minutes after it became ImagePullError.
    The name of the state as well: in the same second the observer may overwrite the one that an automation has set.
    """
    if run.state is None or run.state.name not in (PENDING, *CAUSES.values()):
        return
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
    logs = client.read_logs(wanted, limit=200, sort=LogSort.TIMESTAMP_DESC)
    began = next((log.timestamp for log in logs if log.name == WORKER and SUBMITTING.match(log.message)), None)
    said = next((log.message for log in logs if log.name == OBSERVER and (not began or log.timestamp >= began)), "")
    name = next((name for begin, name in CAUSES.items() if said.startswith(begin)), None)
    if name and (name, said) != (run.state.name, run.state.message):
        client.set_flow_run_state(run.id, Pending(name=name, message=said), force=True)
