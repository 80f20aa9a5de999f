"""Multi-view benchmark on held-out objects (§4.5, Fig. 10)."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.prefect_flows.stage_flows import run_stage_flow


@flow(
    name="multiview-benchmark",
    flow_run_name="multiview-benchmark-{preset}",
    timeout_seconds=24 * 3600,
    persist_result=True,
)
def multiview_benchmark(
    preset: str = "tiny",
    parent: str | None = None,
    inputs: list[dict[str, Any]] | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Multi-view benchmark on held-out objects (§4.5, Fig. 10).

    preset: name or file; parent and inputs are set by `full-pipeline` (MLflow key, DVC hashes of the inputs);
    store: `s3://bucket/prefix` for inputs and outputs (default: SVD_STORE).
    Returns metrics and the DVC hashes of the outputs.
    """
    return run_stage_flow("multiview-benchmark", preset, parent, inputs, store)
