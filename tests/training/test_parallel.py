"""Two ranks, replicated (DDP) or sharded (FSDP2), train to the weights of one, also when both are killed on the way.

All of it happens in one launch: torchrun starts the ranks anew whenever they die.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy_training import PHASE, toy_context, toy_preset

from svd.config import Preset
from svd.training import callbacks
from svd.training.stages import (
    run_camera_lora,
    run_frame_interpolation,
    run_high_quality_finetuning,
    run_image_pretraining,
    run_image_to_video,
    run_video_pretraining,
)

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_parallel import run_ranks
run_ranks(Path({folder!r}))
"""
MODEL = "unet/diffusion_pytorch_model.safetensors"
ADAPTER = "zoom/adapter_model.safetensors"
KILLED_AT = 3


def preset(strategy: str, iterations: int = 4, **more: object) -> Preset:
    values: dict[str, object] = {
        "phases": [{**PHASE, "iterations": iterations}, {**PHASE, "iterations": 2}],
        "strategy": strategy,
        "precision": "32-true",
        "devices": int(os.environ.get("WORLD_SIZE", "1")),
        "checkpointing": "all",
        "ema_decay": 0.9,
        "optimizer": "adamw",
        "warmup": 0,
        "decay": "none",
    }
    return toy_preset(**values | more)


def run_video(folder: Path, name: str, strategy: str) -> None:
    """Two phases of video training."""
    image = folder / "outputs" / "image-pretraining"
    run_video_pretraining(toy_context(folder, name, preset(strategy), image_pretraining=image))


def run_shared(folder: Path, name: str, strategy: str, ranks: int = 1) -> None:
    """Image to video, so many ranks to a clip of three frames."""
    phases = [{**PHASE, "frames": 3, "iterations": iterations} for iterations in (3, 2)]
    values = preset(strategy, phases=phases, context_ranks=ranks)
    run_image_to_video(toy_context(folder, name, values, video_pretraining=folder / "outputs" / "one"))


def run_branches(folder: Path, prefix: str, strategy: str) -> None:
    """What else trains differently: in bfloat16, by Muon, with a live autoencoder, with a learned mask, an adapter."""
    first = folder / "outputs" / "one"
    mixed = toy_context(folder, f"{prefix}-mixed", preset(strategy, 1, precision="bf16-mixed"), video_pretraining=first)
    run_high_quality_finetuning(mixed)
    muon = preset(strategy, optimizer="muon")
    run_high_quality_finetuning(toy_context(folder, f"{prefix}-muon", muon, video_pretraining=first))
    short = preset(strategy, iterations=1)
    run_image_to_video(toy_context(folder, f"{prefix}-image-to-video", short, video_pretraining=first))
    run_frame_interpolation(toy_context(folder, f"{prefix}-interpolation", short, high_quality_finetuning=first))
    lora = short.model_copy(update={"camera_lora": short.camera_lora.model_copy(update={"motions": ["zoom"]})})
    parent = folder / "outputs" / "one-image-to-video"
    run_camera_lora(toy_context(folder, f"{prefix}-lora", lora, image_to_video=parent))


def run_ranks(folder: Path) -> None:
    """What both ranks run; each strategy's first life ends with a SIGKILL of both of them."""
    for strategy in ("ddp", "fsdp2"):
        if not (folder / "work" / strategy / "phase-0" / "history.json").exists():
            kill_once(folder / f"{strategy}-killed")
        run_video(folder, strategy, strategy)
    run_branches(folder, "fsdp2", "fsdp2")
    muon = preset("ddp", optimizer="muon")
    run_high_quality_finetuning(toy_context(folder, "ddp-muon", muon, video_pretraining=folder / "outputs" / "one"))
    for strategy in ("ddp", "fsdp2"):
        run_shared(folder, f"{strategy}-shared", strategy, ranks=2)


def kill_once(mark: Path) -> None:
    """Let this process die by SIGKILL at step KILLED_AT, unless it has before."""
    if mark.with_name(f"{mark.name}-{os.environ['RANK']}").exists():
        return
    original = callbacks.Averaging.on_train_batch_end

    def die(self: callbacks.Averaging, *arguments: object) -> None:
        original(self, *arguments)
        if self.last_step == KILLED_AT:
            mark.with_name(f"{mark.name}-{os.environ['RANK']}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    callbacks.Averaging.on_train_batch_end = die  # type: ignore[method-assign]


pytestmark = pytest.mark.timeout(1800)  # six starts of Python and torch on two cores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of one rank, and of two in both ways."""
    folder = tmp_path_factory.mktemp("ranks")
    run_image_pretraining(toy_context(folder, "image-pretraining"))
    run_video(folder, "one", "auto")
    run_branches(folder, "one", "auto")
    run_shared(folder, "one-shared", "auto")
    script = folder / "ranks.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # Each of two ranks kills itself once in each of two strategies; where one dies before the other has got there, the
    # other's turn comes in the next life.
    launcher.append("--max-restarts=4")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Else ranks that start anew read the addresses of the dead ones from the launcher's store.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    done = subprocess.run([*launcher, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / "outputs" / name)


def norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def assert_equal(
    one: dict[str, Tensor], two: dict[str, Tensor], start: dict[str, Tensor], within: float = 3e-3
) -> None:
    """The runs are apart by less than 0.3 % (`within`) of the way that training went from `start`.

    Not element by element: where a gradient is nothing but rounding (a bias before a normalisation), Adam makes a step
    of it.
    """
    assert one.keys() == two.keys()
    moved = norm(one[k] - start[k] for k in one if k in start and start[k].shape == one[k].shape)
    apart = norm(one[k] - two[k] for k in one)
    assert moved > 0.3, "training moved nothing that could differ"
    assert apart < within * moved


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_killed_on_the_way_equal_one(folder: Path, strategy: str) -> None:
    assert all((folder / f"{strategy}-killed-{rank}").exists() for rank in range(2)), "nothing was killed"
    start = weights(folder, f"image-pretraining/{MODEL}")
    one, two = weights(folder, f"one/{MODEL}"), weights(folder, f"{strategy}/{MODEL}")
    assert_equal(one, two, start)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert (one["conv_in.weight"] - start["conv_in.weight"]).abs().max() > 1e-3


@pytest.mark.slow
def test_shards_may_travel_in_bfloat16(folder: Path) -> None:
    one, two = (json.loads((folder / f"outputs/{name}-mixed/metrics.json").read_text()) for name in ("one", "fsdp2"))
    assert two["validation_loss_before"] == pytest.approx(one["validation_loss_before"], rel=2e-3)
    assert two["validation_loss_after"] == pytest.approx(one["validation_loss_after"], rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_muon_orthogonalises_whole_matrices_however_they_are_sharded(folder: Path, strategy: str) -> None:
    one, two = weights(folder, f"one-muon/{MODEL}"), weights(folder, f"{strategy}-muon/{MODEL}")
    assert all(bool(tensor.isfinite().all()) for tensor in two.values())
    # Orthogonal matrices have no small directions: what is rounding in a gradient becomes a step (1 % with DDP, too).
    assert_equal(one, two, weights(folder, f"one/{MODEL}"), within=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("result", ["image-to-video", "interpolation"])
def test_a_live_autoencoder_and_a_learned_mask_can_be_sharded(folder: Path, result: str) -> None:
    one, two = weights(folder, f"one-{result}/{MODEL}"), weights(folder, f"fsdp2-{result}/{MODEL}")
    assert_equal(one, two, weights(folder, f"one/{MODEL}"))
    if result == "interpolation":
        torch.testing.assert_close(two["mask_latent"], one["mask_latent"], atol=1e-5, rtol=1e-3)
        assert one["mask_latent"].any()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_that_share_each_clip_equal_one(folder: Path, strategy: str) -> None:
    one, two = weights(folder, f"one-shared/{MODEL}"), weights(folder, f"{strategy}-shared/{MODEL}")
    assert_equal(one, two, weights(folder, f"one/{MODEL}"))
    for name, within in (("before", 1e-5), ("after", 1e-4)):
        first, second = (
            json.loads((folder / f"outputs/{run}-shared/metrics.json").read_text())[f"validation_loss_{name}"]
            for run in ("one", strategy)
        )
        assert second == pytest.approx(first, abs=within)


@pytest.mark.slow
def test_an_adapter_can_be_sharded(folder: Path) -> None:
    one, two = weights(folder, f"one-lora/{ADAPTER}"), weights(folder, f"fsdp2-lora/{ADAPTER}")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert "lora_B" not in name or tensor.any(), name
