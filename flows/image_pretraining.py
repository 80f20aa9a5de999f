"""Stage I: switch the image model to the EDM framework and its resolution (§3.2, D.2)."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.prefect_flows.stage_flows import run_stage_flow


@flow(
    name="image-pretraining",
    flow_run_name="image-pretraining-{preset}",
    timeout_seconds=240 * 3600,
    persist_result=True,
)
def image_pretraining(
    preset: str = "tiny",
    parent: str | None = None,
    inputs: list[dict[str, Any]] | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Stage I: switch the image model to the EDM framework and its resolution (§3.2, D.2).

    preset: name or file; parent and inputs are set by `full-pipeline` (MLflow key, DVC hashes of the inputs);
    store: `s3://bucket/prefix` for inputs and outputs (default: SVD_STORE).
    Returns metrics and the DVC hashes of the outputs.
    """
    return run_stage_flow("image-pretraining", preset, parent, inputs, store)
