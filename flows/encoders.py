"""Get the text and image encoders: released weights, or a toy CLIP trained on synthetic captions."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.prefect_flows.stage_flows import run_stage_flow


@flow(name="encoders", flow_run_name="encoders-{preset}", timeout_seconds=6 * 3600, persist_result=True)
def encoders(
    preset: str = "tiny",
    parent: str | None = None,
    inputs: list[dict[str, Any]] | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Get the text and image encoders: released weights, or a toy CLIP trained on synthetic captions.

    preset: name or file; parent and inputs are set by `full-pipeline` (MLflow key, DVC hashes of the inputs);
    store: `s3://bucket/prefix` for inputs and outputs (default: SVD_STORE).
    Returns metrics and the DVC hashes of the outputs.
    """
    return run_stage_flow("encoders", preset, parent, inputs, store)
