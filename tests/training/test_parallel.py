"""Two replicated ranks train to the weights of one, also when they are interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import PHASE, toy_context, toy_preset

from svd.training.stages import run_image_pretraining, run_video_pretraining

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_parallel import run
run(Path({folder!r}), {name!r}, {strategy!r}, {stop})
"""


def run(folder: Path, name: str, strategy: str, stop: int = 0) -> None:
    """Train two phases on the ranks of the environment; `stop` > 0 raises after that step of the first one."""
    phases = [{**PHASE, "iterations": 4}, {**PHASE, "iterations": 2}]
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    preset = toy_preset(
        phases=phases,
        strategy=strategy,
        devices=devices,
        checkpointing="all",
        ema_decay=0.9,
        optimizer="adamw",
        warmup=0,
        decay="none",
    )
    image = folder / "outputs" / "image-pretraining"
    context = toy_context(folder, name, preset, image_pretraining=image)
    if stop:
        from svd.training import callbacks

        original = callbacks.Averaging.on_train_batch_end

        def fail(self: callbacks.Averaging, *arguments: object) -> None:
            original(self, *arguments)
            if self.last_step == stop:
                raise KeyboardInterrupt

        callbacks.Averaging.on_train_batch_end = fail  # type: ignore[method-assign]
    run_video_pretraining(context)


def launch(folder: Path, name: str, strategy: str, stop: int = 0) -> subprocess.CompletedProcess[str]:
    script = folder / f"{name}-{stop}.py"
    script.write_text(
        SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder), name=name, strategy=strategy, stop=stop)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp"])
def test_two_ranks_equal_one(tmp_path: Path, strategy: str) -> None:
    run_image_pretraining(toy_context(tmp_path, "image-pretraining"))
    run(tmp_path, "one", "auto")
    stopped = launch(tmp_path, "two", strategy, stop=3)
    assert stopped.returncode != 0
    assert (tmp_path / "work" / "two" / "phase-0" / "step=2.ckpt").exists(), stopped.stderr[-3000:]
    finished = launch(tmp_path, "two", strategy)
    assert finished.returncode == 0, finished.stderr[-3000:]
    one, two = (
        load_file(tmp_path / "outputs" / name / "unet" / "diffusion_pytorch_model.safetensors")
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    moved = load_file(tmp_path / "outputs/image-pretraining/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert (moved - one["conv_in.weight"]).abs().max() > 1e-3, "training moved nothing that could differ"
