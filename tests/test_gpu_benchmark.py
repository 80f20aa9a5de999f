"""The accelerator benchmark without an accelerator: toy sizes, and its Triton kernels in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
