"""`svd plan`: its tables, its JSON, its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def svd(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "200"})


@pytest.mark.slow
def test_tables_and_json_say_the_same() -> None:
    table = svd("train", "--plan", "camera-lora", "--price", "2.5", "--gpu", "h100")
    assert table.returncode == 0, table.stderr
    assert "camera-lora" in table.stdout and "6x64x64" in table.stdout and "cost" in table.stdout
    done = svd("plan", "camera-lora", "--json", "--price", "2.5", "--gpu", "h100")
    (row,) = json.loads(done.stdout)
    assert row["runs"] == 3 and row["fits"] and row["samples"] == 60 * 16
    seconds = 3 * 60 * row["flops_per_step_and_device"] / (67e12 * 0.3)
    assert row["gpu_hours"] == pytest.approx(seconds / 3600) and row["cost"] == pytest.approx(2.5 * row["gpu_hours"])
    parts = {key: value for key, value in row["memory_bytes"].items() if key != "total"}
    assert row["memory_bytes"]["total"] == sum(parts.values())
    assert f"{row['parameters']['total'] / 1e6:,.2f}" in table.stdout


@pytest.mark.slow
def test_what_is_too_large_is_one_line() -> None:
    done = svd("plan", "frame-interpolation", "--gpu", "h100", "--memory", "1.2")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: frame-interpolation, phase 1: needs 0.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "nothing"], "no stage 'nothing'"),
        (["plan", "--gpu", "b200"], "no GPU 'b200'"),
        (["train"], "svd stage image-to-video"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str) -> None:
    done = svd(*arguments)
    assert done.returncode == 1 and said in done.stderr
    assert len(done.stderr.splitlines()) == 1
