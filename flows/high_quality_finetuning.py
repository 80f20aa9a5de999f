"""Stage III: finetuning on high-quality clips (§3.4, D.3)."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.prefect_flows.stage_flows import run_stage_flow


@flow(
    name="high-quality-finetuning",
    flow_run_name="high-quality-finetuning-{preset}",
    timeout_seconds=720 * 3600,
    persist_result=True,
)
def high_quality_finetuning(
    preset: str = "tiny",
    parent: str | None = None,
    inputs: list[dict[str, Any]] | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Stage III: finetuning on high-quality clips (§3.4, D.3).

    preset: name or file; parent and inputs are set by `full-pipeline` (MLflow key, DVC hashes of the inputs);
    store: `s3://bucket/prefix` for inputs and outputs (default: SVD_STORE).
    Returns metrics and the DVC hashes of the outputs.
    """
    return run_stage_flow("high-quality-finetuning", preset, parent, inputs, store)
