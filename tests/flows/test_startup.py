"""What the quick commands import: nothing that takes long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "mlflow", "dvc", "pandas", "boto3", "prefect", "polars", "numpy", "pyarrow", "av"}
PROGRAM = """
import atexit, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
sys.argv = ["svd", *sys.argv[1:]]
from flows.cli.entry import main
main()
"""


def imported(*arguments: str, code: int = 0, **env: str) -> tuple[set[str], str]:
    """Run `svd` with these arguments; return the names of all modules that were imported, and what it printed.

    Messages are among the names, word by word.
    """
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == code, done.stderr
    return set(done.stderr.split()), done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "pipeline"),
        (["--version"], "svd-platform"),
        (["stages"], "image-pretraining"),
        (["stages", "--reaching", "svd/training/lora.py"], "camera-lora"),
        (["stack", "--help"], "status"),
        (["curate", "--help"], "--dry-run"),
        (["lineage", "--help"], "--source"),
        (["gc", "--help"], "--delete"),
        (["plan", "--help"], "--gpu"),
    ],
)
def test_quick_commands_import_nothing_heavy(arguments: list[str], said: str) -> None:
    modules, printed = imported(*arguments)
    assert said in printed and "flows.cli.app" in modules
    assert sorted(HEAVY & modules) == []


def test_completion_imports_nothing_heavy() -> None:
    words = {"_SVD_COMPLETE": "complete_bash", "COMP_WORDS": "svd sta", "COMP_CWORD": "1"}
    modules, printed = imported(**words)
    assert printed.split() == ["stage", "stages", "stack"]
    assert sorted(HEAVY & modules) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nothing"], "'nothing';"), (["curation", "-p", "nothing"], "'nothing':")],
)
def test_a_wrong_stage_or_preset_is_told_before_anything_heavy(arguments: list[str], said: str) -> None:
    modules, _ = imported("stage", *arguments, code=1)
    assert said in modules and "flows.cli.app" in modules
    assert sorted(HEAVY & modules) == []


def test_the_module_is_the_command(tmp_path: Path) -> None:
    module = subprocess.run([sys.executable, "-m", "flows.cli", "stages"], capture_output=True, text=True, cwd=tmp_path)
    assert module.returncode == 0 and "threshold-calibration" in module.stdout
