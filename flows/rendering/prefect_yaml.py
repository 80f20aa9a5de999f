"""`prefect.yaml`, made from the table of stages: a deployment per flow, in the work pool that its row names."""

from __future__ import annotations

from typing import Any

from flows.rendering.yaml_text import file_text
from flows.stages import POOLS, STAGES, Stage

NIGHTLY_PRESET = "tiny"
NIGHTLY_CRON = "0 2 * * *"  # UTC
_HEAD = """\
Deployments of all flows. The pools `cpu` and `gpu` are processes on a laptop (`make up`) and Jobs on a cluster
(infra/kubernetes, infra/prefect/kubernetes-pools.yaml); only the pool's type differs, this file is the same. A pool of
processes ignores the variables of a job (cores, memory, GPUs).
Pipelines share dvc.lock: one at a time, by the limit that flows/stack/server_setup.py puts on their queue. A
`concurrency_limit` of a deployment would kill the run when the server restarts: its lease lives in the server's memory.
"""


def render_deployments() -> str:
    """Return the text of prefect.yaml: the pipeline, the nightly evaluation, and every stage."""
    content = {
        "name": "svd-platform",
        "prefect-version": ">=3.8.8,<3.9",
        "build": None,
        "push": None,
        "pull": [{"prefect.deployments.steps.set_working_directory": {"directory": "{{ $SVD_HOME }}"}}],
        "deployments": [
            _pipeline(),
            _nightly(),
            *(_check(pool) for pool in POOLS),
            *(_stage(stage) for stage in STAGES.values()),
        ],
    }
    return file_text(_HEAD, content)


def _pool(name: str, queue: str = "default", variables: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"name": name, "work_queue_name": queue, "job_variables": variables or {}}


def _pipeline() -> dict[str, Any]:
    return {
        "name": "full-pipeline",
        "entrypoint": "flows/prefect_flows/full_pipeline.py:full_pipeline",
        "description": "From raw video to an evaluated model",
        "tags": ["svd", "pipeline"],
        "work_pool": _pool("cpu", "pipelines"),
    }


def _nightly() -> dict[str, Any]:
    return {
        "name": "nightly-evaluation",
        "entrypoint": "flows/prefect_flows/nightly.py:nightly_evaluation",
        "description": "Evaluate the current models and write the report, every night",
        "parameters": {"preset": NIGHTLY_PRESET},
        "tags": ["svd", "nightly"],
        "work_pool": _pool("cpu", "pipelines"),
        "schedules": [{"cron": NIGHTLY_CRON, "timezone": "UTC", "active": True}],
    }


def _check(pool: str) -> dict[str, Any]:
    return {
        "name": f"check-{pool}",
        "entrypoint": "flows/prefect_flows/platform_check.py:platform_check",
        "description": f"Whether the stages of the pool {pool} find what they need (`svd platform check`)",
        "parameters": {"pool": pool},
        "tags": ["svd", "check"],
        "work_pool": _pool(pool, variables={"cpu_request": "100m", "memory_request": "512Mi", "memory_limit": "4Gi"}),
    }


def _stage(stage: Stage) -> dict[str, Any]:
    pod = stage.pod
    variables: dict[str, Any] = {"cpu_request": str(pod.cpu), "memory_request": pod.memory}
    variables |= {"memory_limit": pod.memory_limit} | ({"gpus": pod.gpus} if pod.gpus else {})
    return {
        "name": stage.name,
        "entrypoint": f"flows/prefect_flows/stage_flows.py:{stage.name.replace('-', '_')}",
        "description": stage.description,
        "tags": ["svd", "stage"],
        "work_pool": _pool(stage.pool, variables=variables),
    }
