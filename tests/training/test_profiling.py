"""`--profile N`: a trace that parses, of N steps, with a table; and the same weights as without."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_training import PHASE, toy_context, toy_preset

from svd.stage import Profile
from svd.training import callbacks, profiling
from svd.training.stages import run_image_pretraining


def train(folder: Path, name: str, steps: int, *iterations: int, parts: int = 1) -> dict[Path, bytes]:
    """Train phases of so many steps and trace some of each; return what is published. Muon would fill the trace."""
    phases = [{**PHASE, "frames": 1, "iterations": count} for count in iterations]
    context = toy_context(folder, name, toy_preset(phases=phases, optimizer="adamw", gradient_accumulation=parts))
    run_image_pretraining(replace(context, profile=Profile(steps, folder / "traces" / name) if steps else None))
    return {path.relative_to(context.output): path.read_bytes() for path in context.output.rglob("*.*")}


def test_the_trace_parses_and_the_table_names_what_costs_most(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, "traced", 1, 4)
    (path,) = (tmp_path / "traces" / "traced").iterdir()
    assert path.name == "phase-0-steps-4-4.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {event["name"] for event in events if "ProfilerStep" in event["name"]} == {"ProfilerStep#3"}
    called = [event["name"] for event in events if event.get("cat") == "cpu_op"]
    assert called.count("aten::convolution_backward") >= 1, "a backward pass"
    (text,) = (record.getMessage() for record in caplog.records if path.name in record.getMessage())
    table = text.splitlines()[2:]
    assert len(table) == profiling.COSTLIEST and all("#" not in line for line in table)
    times, shares = zip(*((float(line.split()[-2]), float(line.split()[-1][:-1])) for line in table), strict=True)
    assert times == tuple(sorted(times, reverse=True)) and times[-1] > 0
    assert 30 < sum(shares) < 100


def test_a_trace_that_cannot_be_written_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "traces").write_text("a file")
    assert train(tmp_path, "traced", 1, 4)
    assert "no trace is written, the training goes on" in caplog.text


@pytest.mark.slow
def test_each_phase_leaves_what_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    traced = train(tmp_path, "short", 9, 5, 3, 7, parts=2)
    assert traced == train(tmp_path, "plain", 0, 5, 3, 7, parts=2)
    names = sorted(path.name for path in (tmp_path / "traces" / "short").iterdir())
    assert names == ["phase-0-steps-4-5.json.gz", "phase-2-steps-12-15.json.gz"]
    (text,) = (gzip.decompress((tmp_path / "traces/short" / name).read_bytes()).decode() for name in names[1:])
    assert {f"ProfilerStep#{step}" for step in range(3, 7)} == {*re.findall(r"ProfilerStep#\d+", text)}
    assert [name for name in ("phase-0", "phase-1", "phase-2") if f"{name}: too few steps" in caplog.text] == [
        "phase-1"
    ]


@pytest.mark.slow
def test_sigterm_leaves_no_trace_and_the_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = callbacks.Record.on_train_batch_end

    def terminate(self: callbacks.Record, trainer: Any, *arguments: Any) -> None:
        original(self, trainer, *arguments)
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Record, "on_train_batch_end", terminate)
        with pytest.raises(SystemExit):
            train(tmp_path, "ended", 3, 8)
    assert not (tmp_path / "traces").exists()
    ended = train(tmp_path, "ended", 1, 8)
    assert [path.name for path in (tmp_path / "traces" / "ended").iterdir()] == ["phase-0-steps-8-8.json.gz"]
    assert ended == train(tmp_path, "whole", 0, 8)
