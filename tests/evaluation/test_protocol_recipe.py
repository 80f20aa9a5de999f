"""An evaluation protocol is added from outside by the recipe of CONTRIBUTING: one entry, one file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = "evaluation/frechet/protocol.py"
ENTRY = """EvalProtocol("ours_128", "ucf101", VIDEOMAE, small, small, frames=16, fps=8.0, real=2048, generated=2048),
    )
    return {"""
STEPS = "    small: tuple[Resize | Crop, ...] = (Resize(128, antialias=True), Crop(128, 128))\n    protocols = (\n"


@pytest.mark.slow
def test_a_protocol_is_one_entry(tmp_path: Path) -> None:
    for package in ("svd", "evaluation", "flows"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (tmp_path / FILE).read_text()
    changed = text.replace("    )\n    return {", ENTRY, 1).replace("    protocols = (\n", STEPS, 1)
    (tmp_path / FILE).write_text(changed)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"}

    def svd(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "flows.cli", "evaluate", *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    listed = svd("protocols")
    (row,) = (line for line in listed.stdout.splitlines() if "ours_128" in line)
    assert "videomae" in row and "2048" in row, listed.stderr
    scored = svd("clips", "real", "generated", "--protocol", "ours_128", "--offline")
    assert scored.returncode == 1 and "real: no such folder" in scored.stderr  # the name itself is known
    unknown = svd("clips", "real", "generated", "--protocol", "ours_129", "--offline")
    assert "no protocol 'ours_129'; known: " in unknown.stderr and "ours_128" in unknown.stderr
    different = [file for file in ROOT.joinpath("evaluation").rglob("*.py") if _differs(file, tmp_path)]
    assert [file.relative_to(ROOT).as_posix() for file in different] == [FILE]


def _differs(file: Path, copy: Path) -> bool:
    return file.read_bytes() != (copy / file.relative_to(ROOT)).read_bytes()
