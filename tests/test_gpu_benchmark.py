"""The accelerator benchmark without an accelerator: toy sizes, and its Triton kernels in Triton's interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = """
import torch
import torch.nn.functional as F
from benchmarks.gpu.triton_attention import temporal_attention
from benchmarks.gpu.triton_norm import group_norm_silu

torch.manual_seed(0)
for shape in ((2, 96, 64), (1, 700, 96)):  # less than a chunk, and chunks of unequal length
    x, weight, bias = torch.randn(shape) + 1, torch.randn(shape[2]), torch.randn(shape[2])
    expected = F.silu(F.group_norm(x.transpose(1, 2), 32, weight, bias, 1e-5)).transpose(1, 2)
    torch.testing.assert_close(group_norm_silu(x, weight, bias, 32, 1e-5), expected, atol=1e-5, rtol=1e-5)
for frames, heads in ((4, 3), (25, 2)):
    q, k, v = (torch.randn(2, frames, 5, heads * 64) for _ in range(3))
    a, b, c = (x.unflatten(-1, (heads, 64)).permute(0, 2, 3, 1, 4) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(a, b, c).permute(0, 3, 1, 2, 4).flatten(-2)
    torch.testing.assert_close(temporal_attention(q, k, v, heads), expected, atol=1e-5, rtol=1e-5)
"""
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


def test_kernels_compute_what_torch_does() -> None:
    python("-c", KERNELS, TRITON_INTERPRET="1")


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
    assert sections == {"decode", "sampling", "forward", "memory", "train", "conv", "norm", "attention"}
    notes = [row["note"] for row in rows if row["milliseconds"] is None]
    assert all(re.match(r"relative distance |\d+% of the time", note) for note in notes) and len(notes) == 2, notes
    assert all(row["milliseconds"] > 0 and not row["note"] for row in rows if row["milliseconds"] is not None)
    found = {(row["section"], row["case"], row["variant"]) for row in rows}
    for section in ("sampling", "forward", "train"):
        cases = {case for name, case, _ in found if name == section}
        assert len(cases) == {"sampling": 1, "forward": 2, "train": 3}[section]
        for name in ("ours, eager", "ours, compiled", "diffusers, eager", "diffusers, compiled"):
            assert {(section, case, name) for case in cases} <= found
    (distance,) = (float(note.split()[-1]) for note in notes if note.startswith("relative distance"))
    assert 1e-4 < distance < 3e-2  # bfloat16 has 8 bits
