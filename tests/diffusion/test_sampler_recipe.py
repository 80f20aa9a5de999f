"""A solver is added from outside by the recipe of CONTRIBUTING: a function and its name, two files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from svd.config import Sampling, Solver
from svd.diffusion.sampler import SOLVERS

ROOT = Path(__file__).parents[2]
MIDPOINT = '''

@solver
def midpoint(denoise: LevelDenoiser, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Take the slope at the geometric middle of the step (Runge-Kutta of order 2)."""
    for sigma, following in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        if following > 0:
            middle = (sigma * following).sqrt()
            between = x + (middle - sigma) * slope
            slope = (between - denoise(between, middle)) / middle
        x = x + (following - sigma) * slope
        yield x
'''
INSERTIONS = {
    "svd/config/generation.py": ('Literal["euler",', 'Literal["midpoint", "euler",'),
    "svd/diffusion/sampler.py": ("\n\ndef sample(", f"{MIDPOINT}\n\ndef sample("),
}
PROGRAM = """
import torch
from svd.config import Sampling
from svd.diffusion.sampler import karras_sigmas, sample
chosen = Sampling(solver="midpoint")  # the preset takes the name
noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
def denoise(x, sigma):  # x0 ~ N(0.7, 0.5^2)
    return (0.25 * x + sigma[:, None] ** 2 * 0.7) / (0.25 + sigma[:, None] ** 2)
start = noise * (1 + 80.0**2) ** 0.5
exact = 0.7 + (start - 0.7) * 0.5 / (0.25 + 80.0**2) ** 0.5
for name in (chosen.solver, "euler"):
    print((sample(denoise, noise, karras_sigmas(32, 0.002, 80.0).double(), name) - exact).abs().mean().item())
from typing import get_type_hints
from flows.cli.generate_options import Solving
assert "midpoint" in str(get_type_hints(Solving)["solver"])  # and so does the command
"""


def test_the_names_in_the_options_are_the_functions() -> None:
    assert set(get_args(Solver)) == set(SOLVERS)
    assert Sampling.model_fields["solver"].annotation == Solver


def test_a_solver_is_a_function_and_its_name(tmp_path: Path) -> None:
    for package in ("svd", "flows"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, (old, new) in INSERTIONS.items():
        text = (tmp_path / file).read_text()
        assert text.count(old) == 1, file
        (tmp_path / file).write_text(text.replace(old, new))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    midpoint, euler = map(float, done.stdout.split())
    assert midpoint < euler / 4
    assert len(INSERTIONS) == 2


@pytest.mark.parametrize("name", get_args(Solver))
def test_every_name_is_an_option_of_the_command(name: str) -> None:
    from typer.testing import CliRunner

    from flows.cli.generate import generate_app

    result = CliRunner().invoke(generate_app, ["text", "--solver", name, "--steps", "0"])
    assert "--steps" in result.output and "--solver" not in result.output
