"""Finetune to frame interpolation (§4.4, D.5)."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.prefect_flows.stage_flows import run_stage_flow


@flow(
    name="frame-interpolation",
    flow_run_name="frame-interpolation-{preset}",
    timeout_seconds=96 * 3600,
    persist_result=True,
)
def frame_interpolation(
    preset: str = "tiny",
    parent: str | None = None,
    inputs: list[dict[str, Any]] | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Finetune to frame interpolation (§4.4, D.5).

    preset: name or file; parent and inputs are set by `full-pipeline` (MLflow key, DVC hashes of the inputs);
    store: `s3://bucket/prefix` for inputs and outputs (default: SVD_STORE).
    Returns metrics and the DVC hashes of the outputs.
    """
    return run_stage_flow("frame-interpolation", preset, parent, inputs, store)
