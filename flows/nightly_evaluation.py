"""Every night: evaluate the current models again, write the report, and promote the candidate when it is not worse."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.full_pipeline import full_pipeline
from flows.stages import NIGHTLY


@flow(name="nightly-evaluation", flow_run_name="nightly-evaluation-{preset}", persist_result=True)
def nightly_evaluation(preset: str | None = None) -> dict[str, Any]:
    """Run the evaluation stages whether or not something changed; returns what `full-pipeline` returns."""
    return full_pipeline(preset=preset, stages=list(NIGHTLY), force=True)
