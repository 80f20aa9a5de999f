"""What a training logs of its speed is plausible, comes where the loss is logged, and changes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measured_step import build
from torch.utils.flop_counter import FlopCounterMode
from toy_training import PHASE, SIZE, toy_context, toy_preset

from svd.config import Precision, Preset, TrainingCompute
from svd.latents.batches import IndexedLoader
from svd.latents.loader import Batch
from svd.stage import NoTracker
from svd.tasks.text_to_video import TEXT_TO_VIDEO
from svd.training import speed
from svd.training.planning.step import make_batch
from svd.training.speed import Meter, StepFacts, Stopwatch
from svd.training.stages import run_image_pretraining

CPU = torch.device("cpu")
CLIPS = torch.Size([4, 1, 4, 2, 2])
NAMES = {field.name for field in fields(StepFacts)}


class Facts(NoTracker):
    """A tracker that keeps what is logged, by step."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.at.setdefault(step, {}).update(metrics)


def train(folder: Path, name: str, preset: Preset) -> tuple[dict[int, dict[str, float]], dict[Path, bytes]]:
    """What a training logs by step, and the files it publishes."""
    context = replace(toy_context(folder, name, preset), tracker=(tracker := Facts()))
    run_image_pretraining(context)
    files = {path.relative_to(context.output): path.read_bytes() for path in context.output.rglob("*.*")}
    return tracker.at, files


def preset(iterations: int, **compute: Any) -> Preset:
    return toy_preset(phases=[{**PHASE, "frames": 1, "iterations": iterations}], ema_decay=0.9, **compute)


def meter(stopwatch: Stopwatch, operations: int = 1) -> Meter:
    made = Meter(stopwatch, "32-true", lambda ranks: {CLIPS: operations})
    made.start(CPU, 1)
    return made


@pytest.mark.slow
def test_all_is_logged_where_the_loss_is(tmp_path: Path) -> None:
    logged, _ = train(tmp_path, "logged", preset(100, validate_every=50))
    assert [step for step, metrics in logged.items() if "train_loss" in metrics] == list(range(2, 101, 2))
    for step, metrics in logged.items():
        assert not NAMES & metrics.keys() or (metrics.keys() >= NAMES and "train_loss" in metrics), step
    facts = [metrics for metrics in logged.values() if "mfu" in metrics]
    assert len(facts) == 50
    assert all(0 < at["mfu"] < 1 and 0 < at["data_wait_share"] < 1 and at["gradient_norm"] > 0 for at in facts)
    assert all(0.1 < at["memory_gb"] < 100 and at["samples_per_second"] > 0 for at in facts)
    assert any(name.startswith("train_loss/sigma_") for name in logged[100])


def test_every_fact_is_logged_beside_the_loss(tmp_path: Path) -> None:
    logged, _ = train(tmp_path, "few", preset(3))
    assert [step for step, metrics in logged.items() if metrics.keys() >= {*NAMES, "train_loss"}] == [1, 2, 3]


def test_nothing_of_it_changes_what_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, measured = train(tmp_path, "measured", preset(6))
    monkeypatch.setattr(Meter, "start", lambda *_: None)
    monkeypatch.setattr(Meter, "stop", lambda *_: None)
    monkeypatch.setattr(Meter, "take", lambda *_: StepFacts(0, 0, 0, 0, 0, 0))
    monkeypatch.setattr(speed.WatchedLoader, "__iter__", lambda self: iter(self.loader))
    _, plain = train(tmp_path, "plain", preset(6))
    assert measured == plain and Path("losses.csv") in plain and len(plain) > 4


def test_a_slow_loader_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch comes 0.4 s late; what happens between steps, a pause of 0.5 s here, counts to nothing."""
    original, take, fetched = IndexedLoader.__iter__, Meter.take, []

    def slow(self: IndexedLoader) -> Iterator[Batch]:
        batches, began = original(self), time.perf_counter()
        for batch in batches:
            time.sleep(0.4)
            fetched.append(time.perf_counter() - began)
            yield batch
            began = time.perf_counter()

    def pause(*arguments: Any) -> StepFacts:
        facts = take(*arguments)
        time.sleep(0.5)
        return facts

    monkeypatch.setattr(IndexedLoader, "__iter__", slow)
    monkeypatch.setattr(Meter, "take", pause)
    began = time.perf_counter()
    logged, _ = train(tmp_path, "slow", preset(2, gradient_accumulation=2))
    whole, seconds, waits = time.perf_counter() - began, 0.0, 0.0
    for metrics in (logged[1], logged[2]):
        step = PHASE["batch_size"] / metrics["samples_per_second"]
        seconds += step
        waits += metrics["data_wait_share"] * step
    assert len(fetched) == 4 and waits == pytest.approx(sum(fetched), rel=0.05, abs=0.05)
    assert waits < seconds < whole - 2 * 0.5


def test_waiting_is_told_from_working_and_pauses_count_as_neither() -> None:
    def batches() -> Iterator[Batch]:
        for _ in range(4):
            began = time.perf_counter()
            time.sleep(0.06)
            waits.append(time.perf_counter() - began)
            yield {}

    waits: list[float] = []
    works: list[float] = []
    stopwatch = Stopwatch()
    measured = meter(stopwatch)
    for _ in stopwatch.watch(batches()):
        began = time.perf_counter()
        time.sleep(0.02)
        measured.stop(CLIPS, torch.ones(()))
        works.append(time.perf_counter() - began)
        time.sleep(0.1)
    facts, seconds = measured.take(CPU), sum(waits) + sum(works)
    assert facts.data_wait_share == pytest.approx(sum(waits) / seconds, abs=0.05)
    assert 4 * 4 / facts.samples_per_second == pytest.approx(seconds, rel=0.1)


def test_products_of_matrices_alone_use_the_device_fully() -> None:
    side = speed.LARGEST_ON_CPU
    left, stopwatch, best = torch.rand(side, side), Stopwatch(), 0.0
    for _ in range(5):  # other processes may take the cores from some of them
        measured = meter(stopwatch, operations=3 * 2 * side**3)
        for _ in stopwatch.watch(iter([{}])):
            for _ in range(3):
                torch.mm(left, left)
            measured.stop(CLIPS, torch.ones(()))
        facts = measured.take(CPU)
        best = max(best, facts.mfu)
    assert 0.2 < best < 3
    assert facts.peak_tflops * 1e12 == speed.measure_peak(CPU, "32-true") > 1e8


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_the_peak_is_soon_measured_in_every_precision(precision: Precision) -> None:
    """Many CPUs multiply float16 a hundred times slower."""
    speed.measure_peak.cache_clear()
    began = time.perf_counter()
    assert speed.measure_peak(CPU, precision) > 1e7
    assert time.perf_counter() - began < 10, "on loaded cores; half a second on idle ones"


def test_the_peak_leaves_the_random_state() -> None:
    speed.measure_peak.cache_clear()
    before = torch.get_rng_state()
    meter(Stopwatch())
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_the_operations_are_those_of_a_real_step_without_recomputation(checkpointing: str) -> None:
    config = toy_preset(2 * SIZE, checkpointing=checkpointing, precision="32-true")
    training, phase = config.video_pretraining, config.video_pretraining.phases[0]
    module = build(config, "video-pretraining", TEXT_TO_VIDEO, training)
    module.configure_model()
    shapes = make_batch(config, TEXT_TO_VIDEO, phase, phase.batch_size)
    with FlopCounterMode(display=False) as counter:
        module.losses(
            {name: torch.rand(value.shape).to(value.dtype) for name, value in shapes.items()}
        ).mean().backward()

    def count(passes: int, ranks: int, shared: int = 1) -> int:
        compute = TrainingCompute(gradient_accumulation=passes, context_ranks=shared)
        made = speed.make_meter(Stopwatch(), config, TEXT_TO_VIDEO, training, phase, compute)
        ((latents, operations),) = made.count(ranks).items()
        assert latents == (phase.batch_size // (passes * (ranks // shared)), *shapes["latents"].shape[1:])
        return passes * operations

    real = counter.get_total_flops()
    assert count(1, 1) == pytest.approx(real, rel=0.01) if checkpointing == "none" else count(1, 1) < 0.9 * real
    assert count(2, 1) == pytest.approx(count(1, 1), rel=0.01)
    assert count(1, 2) == pytest.approx(count(1, 1) / 2, rel=0.01)
    assert count(1, 2, shared=2) == pytest.approx(count(1, 1) / 2, rel=0.02)  # both embed the conditioning


def test_the_gradient_norm_is_the_mean_of_the_finite_ones() -> None:
    """A scaler for float16 skips steps whose gradient is infinite."""

    def mean(*norms: float) -> StepFacts:
        measured = meter(Stopwatch())
        for norm in norms:
            measured.stop(CLIPS, torch.tensor(norm))
        return measured.take(CPU)

    assert mean(1, float("inf"), 3).gradient_norm == 2
    assert "gradient_norm" not in mean(float("inf")).metrics()
    assert mean(1).metrics().keys() == NAMES


def test_memory_of_a_process_grows_with_what_it_holds() -> None:
    before = speed.take_memory(CPU)
    held = torch.ones(60_000_000)
    assert speed.take_memory(CPU) - before == pytest.approx(held.nbytes / 1e9, abs=0.06)


def test_a_peak_that_cannot_be_measured_ends_no_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speed, "measure_peak", full)
    stopwatch = Stopwatch()
    made = meter(stopwatch)
    next(stopwatch.watch(iter([{}])))
    made.stop(CLIPS, torch.ones(()))
    assert made.take(CPU).metrics().keys() == NAMES - {"mfu", "peak_tflops"}
    assert "isn't known: CUDA out of memory" in caplog.text


def test_the_utilisation_of_batches_that_were_not_counted_is_not_made_up() -> None:
    stopwatch = Stopwatch()
    made = meter(stopwatch)
    next(stopwatch.watch(iter([{}])))
    made.stop(torch.Size((1, *CLIPS[1:])), torch.ones(()))
    assert made.take(CPU).metrics().keys() == NAMES - {"mfu"}
