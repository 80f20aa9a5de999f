"""Cut, clip, caption, score and filter raw videos into a catalogue and shards (§3, App. C)."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.prefect_flows.stage_flows import run_stage_flow


@flow(name="curation", flow_run_name="curation-{preset}", timeout_seconds=240 * 3600, persist_result=True)
def curation(
    preset: str = "tiny",
    parent: str | None = None,
    inputs: list[dict[str, Any]] | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Cut, clip, caption, score and filter raw videos into a catalogue and shards (§3, App. C).

    preset: name or file; parent and inputs are set by `full-pipeline` (MLflow key, DVC hashes of the inputs);
    store: `s3://bucket/prefix` for inputs and outputs (default: SVD_STORE).
    Returns metrics and the DVC hashes of the outputs.
    """
    return run_stage_flow("curation", preset, parent, inputs, store)
