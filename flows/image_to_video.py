"""Finetune the text-to-video base to image-to-video (§4.3, D.4)."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.prefect_flows.stage_flows import run_stage_flow


@flow(name="image-to-video", flow_run_name="image-to-video-{preset}", timeout_seconds=720 * 3600, persist_result=True)
def image_to_video(
    preset: str = "tiny",
    parent: str | None = None,
    inputs: list[dict[str, Any]] | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Finetune the text-to-video base to image-to-video (§4.3, D.4).

    preset: name or file; parent and inputs are set by `full-pipeline` (MLflow key, DVC hashes of the inputs);
    store: `s3://bucket/prefix` for inputs and outputs (default: SVD_STORE).
    Returns metrics and the DVC hashes of the outputs.
    """
    return run_stage_flow("image-to-video", preset, parent, inputs, store)
