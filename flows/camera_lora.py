"""Train one camera-motion LoRA per motion on temporal attention (§4.3.1, D.4.2)."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.prefect_flows.stage_flows import run_stage_flow


@flow(name="camera-lora", flow_run_name="camera-lora-{preset}", timeout_seconds=72 * 3600, persist_result=True)
def camera_lora(
    preset: str = "tiny",
    parent: str | None = None,
    inputs: list[dict[str, Any]] | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Train one camera-motion LoRA per motion on temporal attention (§4.3.1, D.4.2).

    preset: name or file; parent and inputs are set by `full-pipeline` (MLflow key, DVC hashes of the inputs);
    store: `s3://bucket/prefix` for inputs and outputs (default: SVD_STORE).
    Returns metrics and the DVC hashes of the outputs.
    """
    return run_stage_flow("camera-lora", preset, parent, inputs, store)
