"""A killed training goes on after what only says how it is computed has changed, and ends as an undisturbed one."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_training import toy_context, toy_preset

from svd.config import Preset
from svd.stage import NoTracker, Report
from svd.training import callbacks
from svd.training.stages import run_image_pretraining

MODEL = "unet/diffusion_pytorch_model.safetensors"
STEPS = 6


class Preempted(Exception):
    """What a test raises in place of a power failure."""


def preset(**compute: Any) -> Preset:
    """Adam and float32: the same sums of gradients give the same weights, up to rounding."""
    return toy_preset(ema_decay=0.9, optimizer="adamw", warmup=0, decay="none", **compute)


def train(folder: Path, name: str, **compute: Any) -> Report:
    return run_image_pretraining(toy_context(folder, name, preset(**compute)))


def killed_at(step: int, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, **compute: Any) -> None:
    """Train until `step` is done and checkpoints until then are written."""
    original = callbacks.Averaging.on_train_batch_end

    def fail(self: callbacks.Averaging, *arguments: Any) -> None:
        if arguments[0].global_step == step:
            raise Preempted
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Averaging, "on_train_batch_end", fail)
        with pytest.raises(Preempted):
            train(folder, name, **compute)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the result of an undisturbed training."""
    folder = tmp_path_factory.mktemp("compute")
    train(folder, "undisturbed")
    return folder


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are taken from now on."""
    taken: list[int] = []
    original = callbacks.Averaging.on_train_batch_end

    def count(self: callbacks.Averaging, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step != self.last_step:
            taken.append(trainer.global_step)
        original(self, trainer, *arguments)

    monkeypatch.setattr(callbacks.Averaging, "on_train_batch_end", count)
    return taken


def curve(folder: Path, name: str) -> list[str]:
    return (folder / "outputs" / name / "losses.csv").read_text().splitlines()


def assert_as_undisturbed(folder: Path, name: str, exact: bool) -> None:
    ours, theirs = (load_file(folder / "outputs" / run / MODEL) for run in (name, "undisturbed"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if exact:
            assert ours[key].equal(tensor), key
        else:
            torch.testing.assert_close(ours[key], tensor, atol=3e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


def test_intervals_previews_and_loading_change_no_bit(
    folder: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(3, folder, "intervals", monkeypatch)
    steps.clear()
    report = train(folder, "intervals", checkpoint_every=5, sample_steps=1, num_workers=1)
    assert steps == [3, 4, 5, 6]
    assert report.metrics["steps"] == STEPS
    assert_as_undisturbed(folder, "intervals", exact=True)
    assert curve(folder, "intervals") == curve(folder, "undisturbed")


def test_the_validation_interval_changes_the_rows_of_the_curve_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(3, folder, "validation", monkeypatch)
    train(folder, "validation", validate_every=2)
    assert_as_undisturbed(folder, "validation", exact=True)
    assert curve(folder, "validation")[-1] == curve(folder, "undisturbed")[-1]


@pytest.mark.parametrize("checkpointing", ["fine", pytest.param("all", marks=pytest.mark.slow)])
def test_recomputation_may_change(
    checkpointing: str, folder: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(3, folder, checkpointing, monkeypatch)
    steps.clear()
    train(folder, checkpointing, checkpointing=checkpointing)
    assert steps == [3, 4, 5, 6]
    assert_as_undisturbed(folder, checkpointing, exact=False)


@pytest.mark.parametrize(("before", "after"), [(1, 4), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_accumulation_may_change(
    before: int, after: int, folder: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"accumulation-{before}-{after}"
    killed_at(3, folder, name, monkeypatch, gradient_accumulation=before)
    steps.clear()
    train(folder, name, gradient_accumulation=after)
    assert steps == [3, 4, 5, 6]
    assert_as_undisturbed(folder, name, exact=False)
    for ours, theirs in zip(curve(folder, name)[1:], curve(folder, "undisturbed")[1:], strict=True):
        for one, other in zip(ours.split(","), theirs.split(","), strict=True):
            assert one == other == "" or float(one) == pytest.approx(float(other), rel=1e-3)


def test_half_a_step_that_sigterm_leaves_is_taken_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, batches = callbacks.Record.on_train_batch_end, 0

    def terminate(self: callbacks.Record, *arguments: Any) -> None:
        nonlocal batches
        original(self, *arguments)
        batches += 1
        if batches == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Record, "on_train_batch_end", terminate)
        with pytest.raises(SystemExit):
            train(folder, "half", gradient_accumulation=2)
    assert (folder / "work/half/phase-0/step=2.ckpt").exists()
    train(folder, "half", gradient_accumulation=2)
    train(folder, "whole", gradient_accumulation=2)
    ours, theirs = (load_file(folder / "outputs" / run / MODEL) for run in ("half", "whole"))
    assert all(ours[key].equal(tensor) for key, tensor in theirs.items())
    assert curve(folder, "half") == curve(folder, "whole")


class Steps(NoTracker):
    """A tracker that keeps the steps at which a training loss was measured."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if "train_loss" in metrics:
            self.seen.append(step)


@pytest.mark.slow
def test_the_number_of_devices_may_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes go on where one was killed; `devices` and `strategy` start them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    killed_at(3, folder, "devices", monkeypatch)
    assert (folder / "work/devices/phase-0/step=2.ckpt").exists()
    tracker, changed = Steps(), preset(devices=2, strategy="ddp")
    run_image_pretraining(replace(toy_context(folder, "devices", changed), tracker=tracker))
    assert min(tracker.seen) == 3 and max(tracker.seen) == STEPS
    assert_as_undisturbed(folder, "devices", exact=False)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("fsdp2", "auto"), ("auto", "fsdp2")])
def test_the_strategy_may_change(
    before: str, after: str, folder: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From shards to one file and back; a single process shards, too."""
    name = f"{before}-{after}"
    killed_at(3, folder, name, monkeypatch, strategy=before)
    steps.clear()
    train(folder, name, strategy=after)
    assert steps == [3, 4, 5, 6]
    assert_as_undisturbed(folder, name, exact=False)
    left = (folder / "work" / name).rglob("*.ckpt*")
    assert not [path for path in left if path.suffix != ".lock"]
