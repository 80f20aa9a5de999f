"""A flow run outlives the worker that reads what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.prefect_flows import output
from flows.stack.processes import FLOW_RUN, MARK

PROGRAM = """
import sys
from rich.console import Console
from flows.prefect_flows.output import leave_worker_pipe

before = Console(stderr=True)  # as Prefect's logging makes one before flows are imported
leave_worker_pipe()
print("ready", flush=True)
sys.stdin.read()
for number in range(3):
    before.print(f"rich {number}")
    print(f"line {number}", flush=True)
"""


def live_on(folder: Path, env: dict[str, str]) -> tuple[int, str]:
    """Run the program, close the pipe that it prints into, let it go on; its exit code, and the log of flow runs."""
    environment = {k: v for k, v in os.environ.items() if k not in (MARK, FLOW_RUN)} | env
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    log = folder / output.LOG
    if log.parent.is_dir():
        while not (log.exists() and "ready" in log.read_text()):
            assert process.poll() is None
    else:
        process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    return process.wait(60), log.read_text() if log.exists() else ""


def test_the_death_of_the_worker_costs_no_line(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    code, said = live_on(tmp_path, {MARK: str(tmp_path), FLOW_RUN: "1"})
    assert code == 0
    assert [line for line in said.splitlines() if line] == [
        "ready",
        *(f"{w} {n}" for n in range(3) for w in ("rich", "line")),
    ]


@pytest.mark.parametrize("env", [{}, {FLOW_RUN: "1"}])
def test_elsewhere_output_is_left_alone(tmp_path: Path, env: dict[str, str]) -> None:
    code, said = live_on(tmp_path, env)
    assert code != 0 and said == "", "a broken pipe, as of any program"


def test_the_stack_and_the_flows_mean_the_same_mark() -> None:
    assert output.STACK == MARK
