"""The accelerator benchmark without an accelerator, at toy sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A bare machine: what torch itself doesn't need is not there.
BARE = """
import sys
for name in ("diffusers", "transformers", "pydantic", "lightning", "kornia", "open_clip", "peft", "safetensors"):
    sys.modules[name] = None
sys.argv = ["benchmarks.gpu", *sys.argv[1:]]
import runpy
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_toy_run_on_a_bare_machine_says_what_it_leaves_out(tmp_path: Path) -> None:
    result = tmp_path / "rows.json"
    sections = ("conv", "norm", "attention", "memory")
    output = python("-c", BARE, "--toy", "--device", "cpu", "--only", ",".join(sections), "--output", str(result))
    assert output.count("no diffusers here, its rows are left out") == 1
    written = json.loads(result.read_text())
    assert written["about"]["diffusers"] == "not installed"
    assert {row["section"] for row in written["rows"]} == set(sections)
    assert not any("diffusers" in row["variant"] for row in written["rows"])
    measured = [row for row in written["rows"] if row["milliseconds"]]
    assert {row["variant"] for row in measured} >= {"ours, none", "ours, all", "3 GEMMs", "MATH, strided"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_section_of_a_toy_run_measures_all_its_rows(tmp_path: Path) -> None:
    """Ours and diffusers', eager and compiled, and nothing failed: an error would be the note of a row without time."""
    result = tmp_path / "rows.json"
    python("-m", "benchmarks.gpu", "--toy", "--device", "cpu", "--output", str(result))
    rows = json.loads(result.read_text())["rows"]
    sections = {row["section"] for row in rows}
    assert sections == {"decode", "sampling", "profile", "forward", "memory", "train", "conv", "norm", "attention"}
    notes = [row["note"] for row in rows if row["milliseconds"] is None]
    assert len(notes) == 1 and notes[0].startswith("relative distance "), notes
    measured = [row for row in rows if row["milliseconds"] is not None]
    assert all(row["milliseconds"] > 0 for row in measured)
    assert all(bool(row["note"]) == (row["section"] == "profile") for row in measured)
    found = {(row["section"], row["case"], row["variant"]) for row in rows}
    for section in ("sampling", "forward", "train"):
        cases = {case for name, case, _ in found if name == section}
        assert len(cases) == {"sampling": 1, "forward": 2, "train": 3}[section]
        for name in ("ours, eager", "ours, compiled", "diffusers, eager", "diffusers, compiled"):
            assert {(section, case, name) for case in cases} <= found
    distance = float(notes[0].split()[-1])
    assert 1e-4 < distance < 3e-2  # bfloat16 has 8 bits
