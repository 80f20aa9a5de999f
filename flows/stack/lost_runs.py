"""Flow runs whose process is gone although Prefect's server takes them for pending or running: begun again.

A worker that was killed says nothing of its runs, and while one counts as running its queue stands still.
"""

from __future__ import annotations

from collections.abc import Set

from flows.stack.server_setup import send

LIVING = ["PENDING", "RUNNING", "CANCELLING"]
MESSAGE = "Its process was gone; it goes on where it was."


def schedule_lost_runs(api: str, pool: str, living: Set[str]) -> int:
    """Schedule the runs of the work pool `pool` again that are not among `living`, by id; return how many.

    A pipeline keeps its id, and so adopts the children that it has started. What was being cancelled is cancelled.
    """
    wanted = {"flow_runs": {"state": {"type": {"any_": LIVING}}}, "work_pools": {"name": {"any_": [pool]}}}
    lost = [run for run in send(f"{api}/flow_runs/filter", wanted) if run["id"] not in living]
    for run in lost:
        cancelled = {"type": "CANCELLED", "name": "Cancelled", "message": "Its process was gone."}
        again = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": MESSAGE}
        state = cancelled if run["state_type"] == "CANCELLING" else again
        send(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    return len(lost)
