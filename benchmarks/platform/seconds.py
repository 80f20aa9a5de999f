"""Where the seconds of a pipeline's stages go, of a run in any pool: `python -m benchmarks.platform.seconds RUN_ID`.

Reads the run of `full-pipeline` from the servers that PREFECT_API_URL and MLFLOW_TRACKING_URI name. A row per stage:

* queue: from the child run's creation until a worker has submitted it;
* start: until its flow runs: the pod's scheduling, image and container (or the process), and Python's imports;
* pull: until the stage's MLflow run begins: the lease, inputs by hash;
* work: the MLflow run: the stage itself, and hashing its inputs and its output;
* push: until the flow has ended: the output into DVC's cache and the store, artifacts.

The last column is queue, start, pull and push by all. Demanded of start at `tiny`: at most 15 % of a stage.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from uuid import UUID

from mlflow import MlflowClient
from mlflow.entities import Run
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun

EXPERIMENT = "stable-video-diffusion"


@dataclass(frozen=True)
class Seconds:
    """The parts of a stage's run, in seconds."""

    stage: str
    queue: float
    start: float
    pull: float
    work: float
    push: float

    @property
    def total(self) -> float:
        """Return the time from the creation of the run to its end."""
        return self.queue + self.start + self.pull + self.work + self.push


def children(client: SyncPrefectClient, run: UUID) -> list[FlowRun]:
    """Return the completed child runs of a pipeline, oldest first."""
    found = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run]))
    )
    return sorted((child for child in found if child.state and child.state.is_completed()), key=_created)


def _created(run: FlowRun) -> datetime:
    assert run.created is not None
    return run.created


def tracked(client: MlflowClient, run: UUID) -> Run:
    """Return the MLflow run of a stage's flow run."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`prefect.flow_run_id` = '{run}'")
    return found


def split(client: SyncPrefectClient, mlflow: MlflowClient, run: FlowRun) -> Seconds:
    """Return the parts of a child run."""
    states = {state.name: state.timestamp for state in client.read_flow_run_states(run.id)}
    info = tracked(mlflow, run.id).info
    work = [datetime.fromtimestamp(stamp / 1000, UTC) for stamp in (info.start_time, info.end_time)]
    points = [_created(run), states.get("Pending", states["Running"]), states["Running"], *work, states["Completed"]]
    parts = [(b - a).total_seconds() for a, b in pairwise(points)]
    return Seconds(run.name, *parts)


def main() -> None:
    """Print a row per stage, and the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=UUID, help="id of the pipeline's flow run")
    arguments = parser.parse_args()
    with get_client(sync_client=True) as client:
        rows = [split(client, MlflowClient(), child) for child in children(client, arguments.run)]
    names = ("queue", "start", "pull", "work", "push")
    rows.append(Seconds("all", *(sum(getattr(row, name) for row in rows) for name in names)))
    print(f"{'stage':32}" + "".join(f"{name:>9}" for name in names) + "   overhead")
    for row in rows:
        parts = "".join(f"{getattr(row, name):8.1f}s" for name in names)
        print(f"{row.stage:32}{parts}   {1 - row.work / row.total:8.1%}")


if __name__ == "__main__":
    main()
