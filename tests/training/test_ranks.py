"""The ranks of a training: where they meet, what the first one reports, how the others end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from toy_training import PHASE, toy_preset

from svd.config import Preset
from svd.stage import Report, StageContext, UserError
from svd.training import ranks
from svd.training.launch import on_all_ranks

PATIENCE = 900


def preset(devices: int, iterations: int = 4, **more: object) -> Preset:
    phases = [{**PHASE, "iterations": iterations}, {**PHASE, "iterations": 2}]
    fixed = {"optimizer": "adamw", "warmup": 0, "decay": "none", "ema_decay": 0.9, "strategy": "ddp"}
    return toy_preset(phases=phases, devices=devices, **(fixed | more))


def free_port() -> int:
    """A port whose neighbour 10000 higher exists as well."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            if (port := probe.getsockname()[1]) < 50_000:
                return int(port)


@on_all_ranks("video_pretraining")
def report_place(context: StageContext, note: str) -> Report:
    context.tracker.log_metrics({"rank": float(ranks.rank())}, step=1)
    return Report({"note": note, "ranks": os.environ["WORLD_SIZE"], "pid": os.getpid()}, "")


@on_all_ranks("video_pretraining")
def fail_on_the_second(context: StageContext, how: str) -> None:
    if ranks.rank() == 0:
        time.sleep(600)
    if how == "mistake":
        raise UserError("clips: too few")
    os.kill(os.getpid(), signal.SIGKILL)


class Numbers:
    """A tracker that keeps scalars."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append({**metrics, "step": step})


def context_of(folder: Path, devices: int, **more: object) -> StageContext:
    return StageContext(preset(devices, **more), {}, folder / "output", folder / "work", Numbers())  # type: ignore[arg-type]


def test_the_first_rank_answers_and_reports_outside(tmp_path: Path) -> None:
    context = context_of(tmp_path, 2)
    report = report_place(context, "kept")
    assert (report.metrics["note"], report.metrics["ranks"]) == ("kept", "2")
    assert report.metrics["pid"] != os.getpid()
    assert context.tracker.seen == [{"rank": 0.0, "step": 1}]  # type: ignore[attr-defined]


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^clips: too few$"):
        fail_on_the_second(context_of(tmp_path, 2), "mistake")
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        fail_on_the_second(context_of(tmp_path, 2), "death")


class Full(Numbers):
    """A tracker whose disk is full."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        raise OSError("no space left")


def test_a_tracker_that_fails_ends_the_ranks(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space left"):
        report_place(replace(context_of(tmp_path, 2), tracker=Full()), "")  # type: ignore[arg-type]


def test_several_nodes_need_a_launcher(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"video_pretraining.nodes is 4: .*torchrun --nnodes 4 --nproc-per-node 8"):
        report_place(context_of(tmp_path, 8, nodes=4), "")


FOLLOWER = """
from svd.training.ranks import await_first_rank
context = await_first_rank()
print(context and context.work, flush=True)
"""


@pytest.mark.parametrize("told", [True, False])
def test_the_other_ranks_wait_for_the_first_or_are_let_go(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_store", cache(ranks._store.__wrapped__))
    port = str(free_port())
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "1", "RANK": "1"}
    follower = subprocess.Popen(
        [sys.executable, "-c", FOLLOWER], env=os.environ | place, stdout=subprocess.PIPE, text=True
    )
    for name, value in (place | {"LOCAL_RANK": "0", "RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    context = context_of(tmp_path, 2)
    with contextlib.suppress(UserError), ranks.leading():
        if not told:
            raise UserError("an input is missing")
        ranks.announce(context)
    assert follower.communicate(timeout=PATIENCE)[0].strip() == str(context.work if told else None)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (False, 0)),
        ({"LOCAL_RANK": "1", "RANK": "5"}, (True, 5)),
        ({"LOCAL_RANK": "1"}, (True, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (False, 0)),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, (True, 3)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (False, 0)),
    ],
)
def test_the_place_among_ranks(
    variables: dict[str, str], expected: tuple[bool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "RANK", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (ranks.launched(), ranks.rank()) == expected


def test_the_tiny_preset_uses_one_device() -> None:
    values = yaml.safe_load((Path(__file__).parents[2] / "presets/tiny.yaml").read_text())
    assert all(values[s]["devices"] == 1 for s in values if isinstance(values[s], dict) and "phases" in values[s])
