"""A training killed at any moment and run again ends with the very weights of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from toy_training import PHASE, SIZE, toy_context, toy_preset

from svd.config import Geometry, Preset
from svd.stage import StageContext
from svd.training import callbacks, runner
from svd.training.checkpoint_files import checkpoints, newest_checkpoint
from svd.training.stages import run_image_pretraining, run_video_pretraining


class Preempted(Exception):
    """What a test raises in place of a power failure."""


def preset(iterations: int = 8) -> Preset:
    phases = [{**PHASE, "iterations": iterations}, {**PHASE, "iterations": 3, "p_mean": 0.5}]
    return toy_preset(phases=phases, warmup=3, decay="cosine", ema_decay=0.9, gradient_accumulation=2)


def mixed_preset() -> Preset:
    """Half of the first phase's clips are images; the second has clips of two lengths."""
    plain = preset()
    first, second = plain.video_pretraining.phases
    short = [Geometry(frames=2, height=SIZE, width=SIZE)]
    phases = [first.model_copy(update={"image_share": 0.5}), second.model_copy(update={"buckets": short})]
    training = plain.video_pretraining.model_copy(update={"phases": phases})
    return plain.model_copy(update={"video_pretraining": training})


def weights(context: StageContext) -> dict[str, object]:
    return load_file(context.output / "unet" / "diffusion_pytorch_model.safetensors")


def first_model(folder: Path) -> Path:
    """An image model to start from, made by the real stage."""
    run_image_pretraining(toy_context(folder, "image-pretraining"))
    return folder / "outputs" / "image-pretraining"


@pytest.mark.parametrize("chosen", [preset, mixed_preset])
def test_interrupted_training_equals_an_undisturbed_one(
    chosen: Callable[[], Preset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = first_model(tmp_path)
    undisturbed = toy_context(tmp_path, "undisturbed", chosen(), image_pretraining=image)
    report = run_video_pretraining(undisturbed)
    interrupted = toy_context(tmp_path, "interrupted", chosen(), image_pretraining=image)
    original = callbacks.Averaging.on_train_batch_end
    calls = 0

    def fail(self: callbacks.Averaging, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls in (7, 15, 27):
            raise Preempted
        original(self, *arguments)

    monkeypatch.setattr(callbacks.Averaging, "on_train_batch_end", fail)
    failures = 0
    while not (interrupted.output / "metrics.json").exists():
        try:
            again = run_video_pretraining(interrupted)
        except Preempted:
            failures += 1
    assert failures == 3
    assert again.metrics == report.metrics
    first, second = weights(undisturbed), weights(interrupted)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    for name in ("losses.csv", "samples/generated-0.mp4", "samples/sheet.png"):
        assert (undisturbed.output / name).read_bytes() == (interrupted.output / name).read_bytes(), name


def test_a_kill_between_the_last_step_and_its_result_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = toy_context(tmp_path, "undisturbed", toy_preset(ema_decay=0.9))
    run_image_pretraining(context)
    late, finish = toy_context(tmp_path, "late", toy_preset(ema_decay=0.9)), runner._finish_phase

    def fail(*arguments: object) -> None:
        raise Preempted

    monkeypatch.setattr(runner, "_finish_phase", fail)
    with pytest.raises(Preempted):
        run_image_pretraining(late)
    assert (late.work / "phase-0" / "step=6.ckpt").exists()
    monkeypatch.setattr(runner, "_finish_phase", finish)
    run_image_pretraining(late)
    first, second = weights(context), weights(late)
    assert all(first[name].equal(second[name]) for name in first)
    assert (context.output / "losses.csv").read_bytes() == (late.output / "losses.csv").read_bytes()


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_resume import preset
from toy_training import toy_context
from svd.training.stages import run_video_pretraining
folder = Path({folder!r})
image = folder / "outputs/image-pretraining"
run_video_pretraining(toy_context(folder, sys.argv[1], preset(40), image_pretraining=image))
"""


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", script, name], env=environment, stderr=subprocess.DEVNULL)


def checkpointed_step(folder: Path, name: str) -> int:
    found = (folder / "work" / name / "phase-0").glob("step=*.ckpt")
    return max((int(path.stem.removeprefix("step=")) for path in found), default=-1)


@pytest.mark.slow
def test_sigkill_twice_leaves_the_weights_bitwise_equal(tmp_path: Path) -> None:
    first_model(tmp_path)
    assert start(tmp_path, "undisturbed").wait() == 0
    for after in (4, 20):
        process = start(tmp_path, "killed")
        while checkpointed_step(tmp_path, "killed") < after and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert start(tmp_path, "killed").wait() == 0
    outputs = tmp_path / "outputs"
    assert (outputs / "killed/losses.csv").read_text() == (outputs / "undisturbed/losses.csv").read_text()
    model = "unet/diffusion_pytorch_model.safetensors"
    assert (outputs / "killed" / model).read_bytes() == (outputs / "undisturbed" / model).read_bytes()


def test_sigterm_saves_the_step_it_interrupts_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    video = toy_context(tmp_path, "seed", toy_preset(checkpoint_every=1000))
    original = callbacks.Averaging.on_train_batch_end

    def terminate(self: callbacks.Averaging, *arguments: object) -> None:
        original(self, *arguments)
        if self.last_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(callbacks.Averaging, "on_train_batch_end", terminate)
    with pytest.raises(SystemExit) as caught:
        run_image_pretraining(video)
    assert caught.value.code == 143
    assert "stopped at step 3 by SIGTERM; the same command goes on there" in caplog.text
    assert (video.work / "phase-0" / "step=3.ckpt").exists()


def test_a_checkpoint_that_was_being_written_is_not_resumed_from(tmp_path: Path) -> None:
    """Sharded checkpoints are folders: they get their name when all their files are there."""
    for name in ("step=2.ckpt", "step=10.ckpt", "step=12.ckpt.part"):
        (tmp_path / name).mkdir()
    assert checkpoints(tmp_path)[0] == tmp_path / "step=10.ckpt"
    assert newest_checkpoint(tmp_path / "step=2.ckpt") is None
