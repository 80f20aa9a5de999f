"""Finetune image-to-video to multi-view generation (§4.5, D.6)."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.prefect_flows.stage_flows import run_stage_flow


@flow(
    name="multiview-finetuning",
    flow_run_name="multiview-finetuning-{preset}",
    timeout_seconds=72 * 3600,
    persist_result=True,
)
def multiview_finetuning(
    preset: str = "tiny",
    parent: str | None = None,
    inputs: list[dict[str, Any]] | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Finetune image-to-video to multi-view generation (§4.5, D.6).

    preset: name or file; parent and inputs are set by `full-pipeline` (MLflow key, DVC hashes of the inputs);
    store: `s3://bucket/prefix` for inputs and outputs (default: SVD_STORE).
    Returns metrics and the DVC hashes of the outputs.
    """
    return run_stage_flow("multiview-finetuning", preset, parent, inputs, store)
