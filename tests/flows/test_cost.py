"""What a run costs: children count, attempts add up over kills, prices rerun nothing, a pipeline sums its stages."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import small_project
import torch

from flows.running import runner
from flows.stages import STAGES
from flows.tracking.cost import Cost, Meter, cpu_seconds, gpus, log_pipeline_cost, read_cost
from flows.tracking.runs import RunInfo, tracked_run
from svd.config.load import load_preset
from svd.stage import Report, StageContext

PRICES = {"currency": "EUR", "cpu_hour": 3600, "gpu_hour": 7200}
BURN = "import time\nwhile time.process_time() < 1: pass"


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def run_of(stage: str) -> mlflow.entities.Run:
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd()}/.local/mlflow.db")
    experiment = client.get_experiment_by_name("stable-video-diffusion").experiment_id
    (run,) = client.search_runs([experiment], f"tags.stage = '{stage}'")
    return run


def test_children_count_while_they_run_and_after() -> None:
    start = cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", f"{BURN}\ninput()"], stdin=subprocess.PIPE)
    while cpu_seconds() - start < 0.9:
        time.sleep(0.05)
    child.communicate(b"\n")
    assert 0.9 <= cpu_seconds() - start < 10


def test_attempts_add_up_and_prices_rerun_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_project.make_project(tmp_path, monkeypatch)
    preset = load_preset("tiny", {"compute.prices": PRICES})
    stage = STAGES["orbits"]
    assert runner.work_digest(stage, preset, {}) == runner.work_digest(stage, load_preset("tiny"), {})

    def killed(context: StageContext) -> Report:
        burn(0.5)
        raise KeyboardInterrupt

    small_project.use(monkeypatch, killed)
    with pytest.raises(KeyboardInterrupt):
        runner.run_preset_stage("orbits", load_preset("tiny"))

    def works(context: StageContext) -> Report:
        burn(0.5)
        return small_project.draw(context)

    small_project.use(monkeypatch, works)
    runner.run_preset_stage("orbits", preset)
    run = run_of("orbits")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/.local/mlflow.db")
    first, second = client.get_metric_history(run.info.run_id, "cost/cpu_hours")
    assert (first.step, second.step) == (0, 1)
    assert first.value * 3600 >= 0.4 and first.value * 3600 + 0.4 <= second.value * 3600 < 60
    assert run.data.metrics["cost/gpu_hours"] == 0
    assert run.data.metrics["cost/total"] == pytest.approx(second.value * 3600)
    assert run.data.tags["cost.currency"] == "EUR"


METERED = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from flows.stages import STAGES
from flows.tracking import cost
from svd.config.load import load_preset
cost.SAVE_SECONDS = 0.1
with cost.metered(SimpleNamespace(), STAGES["orbits"], load_preset("tiny"), Path(sys.argv[1])):
    while True: pass
"""


def test_a_killed_run_keeps_what_it_has_cost(tmp_path: Path) -> None:
    for attempt in (1, 2):
        before = read_cost(tmp_path)
        process = subprocess.Popen([sys.executable, "-c", METERED, str(tmp_path)])
        try:
            while read_cost(tmp_path).cpu_seconds < before.cpu_seconds + 0.5:
                assert process.poll() is None
                time.sleep(0.05)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert read_cost(tmp_path).attempts == attempt
    assert read_cost(tmp_path).cpu_seconds >= 1


def test_gpus_are_counted_by_what_the_stage_occupies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    training = load_preset("tiny", {"compute.training.devices": 4, "compute.training.nodes": 2})
    stage = STAGES["image-to-video"]
    assert gpus(stage, training) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    found = [gpus(stage, training), gpus(stage, load_preset("tiny", {"compute.training.devices": "auto"}))]
    found += [gpus(STAGES[name], training) for name in ("latents", "report")]
    assert found == [8, 3, 1, 0]
    meter = Meter(tmp_path, lambda: 8)
    time.sleep(0.2)
    assert 1.6 <= meter.save().gpu_seconds < 80


@pytest.mark.parametrize("moved", [False, True])
def test_a_pipeline_sums_its_stages_and_counts_none_twice(
    moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it goes on: on another machine there is no journal of what it logged before."""
    small_project.make_project(tmp_path, monkeypatch)
    prices = load_preset("tiny", {"compute.prices": PRICES}).compute.prices
    with pytest.raises(KeyboardInterrupt), tracked_run(RunInfo("p", "p", tags={"stage": "p"})) as tracker:
        log_pipeline_cost(tracker, "a", vars(Cost(10, 1)), prices)
        log_pipeline_cost(tracker, "b", vars(Cost(20, 2)), prices)
        raise KeyboardInterrupt
    if moved:
        shutil.rmtree("work")
    with tracked_run(RunInfo("p", "p", tags={"stage": "p"})) as tracker:
        log_pipeline_cost(tracker, "b", vars(Cost(25, 2)), prices)
        log_pipeline_cost(tracker, "c", vars(Cost(5, 0)), prices)
    metrics = {name: value * 3600 for name, value in run_of("p").data.metrics.items()}
    assert metrics["cost/cpu_hours"] == pytest.approx(40) and metrics["cost/gpu_hours"] == pytest.approx(3)
    assert metrics["b/cost_cpu_hours"] == pytest.approx(25)
    assert run_of("p").data.metrics["cost/total"] == pytest.approx(40 + 2 * 3)
