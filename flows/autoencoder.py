"""Train the autoencoder, or the temporal decoder of a released one (VideoLDM §3.1.1)."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.prefect_flows.stage_flows import run_stage_flow


@flow(name="autoencoder", flow_run_name="autoencoder-{preset}", timeout_seconds=72 * 3600, persist_result=True)
def autoencoder(
    preset: str = "tiny",
    parent: str | None = None,
    inputs: list[dict[str, Any]] | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Train the autoencoder, or the temporal decoder of a released one (VideoLDM §3.1.1).

    preset: name or file; parent and inputs are set by `full-pipeline` (MLflow key, DVC hashes of the inputs);
    store: `s3://bucket/prefix` for inputs and outputs (default: SVD_STORE).
    Returns metrics and the DVC hashes of the outputs.
    """
    return run_stage_flow("autoencoder", preset, parent, inputs, store)
