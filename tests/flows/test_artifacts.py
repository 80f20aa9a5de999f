"""Artifacts decorate a run: a server that is away costs them, not the stage."""

from __future__ import annotations

import httpx
import pytest

from flows.prefect_flows import artifacts
from svd.config.load import load_preset


def test_a_server_that_is_away_costs_no_stage(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise httpx.ConnectError("All connection attempts failed")

    monkeypatch.setattr(artifacts, "create_markdown_artifact", refuse)
    artifacts.publish_artifacts("orbits", load_preset("tiny"), {"objects": 2}, "2 objects")
    assert "artifacts of 'orbits' are left out" in caplog.text
