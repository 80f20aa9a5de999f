"""The flow behind `svd platform check`: what a flow run finds in its pool.

Whether it starts at all, which for a pod takes a node and its image, is seen from outside (flows/checking/pools.py).
"""

from __future__ import annotations

from dataclasses import asdict

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from flows.checking.probes import run_probes


@flow(name="platform-check", flow_run_name="platform-check-{pool}", timeout_seconds=600)
def platform_check(pool: str) -> None:
    """Probe what the stages of `pool` need, and keep the findings as the table artifact `platform-check-POOL`."""
    logger, findings = get_run_logger(), []
    for finding in run_probes():
        logger.info("%s: %s, %s", finding.probe, "passed" if finding.passed else "FAILED", finding.seen)
        findings.append(asdict(finding))
    create_table_artifact(findings, key=f"platform-check-{pool}", description="What a flow run finds in this pool")
