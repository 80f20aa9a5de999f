"""No tool reports to its makers, whatever started us; who wants that says so in the environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import flows


@pytest.mark.parametrize("value", [None, "mine"])
def test_telemetry_is_off_from_the_first_import(value: str | None) -> None:
    env = {k: v for k, v in os.environ.items() if k not in flows.NO_TELEMETRY}
    env |= dict.fromkeys(flows.NO_TELEMETRY, value) if value else {}
    program = "import flows.cli.entry, os; print([os.environ[name] for name in flows.NO_TELEMETRY])"
    said = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    assert said.strip() == str([value] * 4 if value else list(flows.NO_TELEMETRY.values()))
