"""Background processes: recognised by pid and start time, stopped with their children; orphans; taken ports."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.stack import env_file, stack
from flows.stack.processes import Processes, check_port
from svd.core.errors import UserError

# a parent with a child; both ignore the interrupt that a terminal would send
FAMILY = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
FAMILY += "print('ready', flush=True); time.sleep(600)"


def start(processes: Processes, name: str = "family") -> tuple[psutil.Process, psutil.Process]:
    process = processes.spawn(name, [sys.executable, "-c", FAMILY], {}, None)
    log = processes.folder / "log" / f"{name}.log"
    while "ready" not in log.read_text():
        assert psutil.pid_exists(process.pid)
    parent = psutil.Process(process.pid)
    return parent, parent.children()[0]


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_process_is_stopped_with_its_children(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    parent, child = start(processes)
    (found,) = processes.running()
    assert (found.name, found.pid) == ("family", parent.pid)
    processes.stop(found)
    assert gone(parent) and gone(child)
    assert list(processes.running()) == [] and list((tmp_path / "run").iterdir()) == []


def test_orphans_of_a_killed_process_are_found_by_their_mark(tmp_path: Path) -> None:
    processes, others = Processes(tmp_path / "a"), Processes(tmp_path / "b")
    parent, child = start(processes)
    stranger, _ = start(others, "stranger")
    os.kill(parent.pid, signal.SIGKILL)
    os.waitpid(parent.pid, 0)
    assert list(processes.running()) == [] and not gone(child)
    assert processes.stop_orphans() == 1
    assert gone(child) and not gone(stranger)
    for process in others.running():
        others.stop(process)


def test_what_a_killed_server_left_is_stopped_and_nothing_else(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    server, child = start(processes, "mlflow")
    worker, flow_run = start(processes, "worker-cpu")
    for dead in (server, worker):
        os.kill(dead.pid, signal.SIGKILL)
        os.waitpid(dead.pid, 0)
    assert processes.stop_rest_of("mlflow") == 1
    assert gone(child) and not gone(flow_run), "flow runs outlive their worker"
    assert processes.stop_rest_of("mlflow") == 0
    assert processes.stop_orphans() == 1


def test_flow_runs_are_known_without_their_worker(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    lead = "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True,"
    lead += " env=os.environ | {'PREFECT__FLOW_RUN_ID': 'living'});"
    processes.spawn("worker-cpu", [sys.executable, "-c", lead, FAMILY], {}, None)
    while "ready" not in (tmp_path / "log" / "worker-cpu.log").read_text():
        time.sleep(0.05)
    assert processes.flow_runs() == {"living"}
    (leader,) = [p for p, _ in processes._marked() if os.getpgid(p.pid) == p.pid]
    leader.kill()  # its child lives on, which is no run
    while not gone(leader):
        time.sleep(0.05)
    assert processes.flow_runs() == set()
    assert processes.stop_orphans() == 1


def test_a_reused_pid_is_never_stopped(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    record = tmp_path / "run" / "prefect.json"
    record.write_text(json.dumps({"name": "prefect", "pid": os.getpid(), "started": 1.0, "port": 4200}))
    assert list(Processes(tmp_path).running()) == []
    assert not record.exists()


def test_a_taken_port_is_named_with_its_process() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port {port} for mlflow is taken by process {os.getpid()} .*--mlflow PORT"
        ):
            check_port(port, "mlflow", "svd stack up --mlflow")
    check_port(port, "mlflow", "svd stack up --mlflow")


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    process = processes.spawn("mlflow", [sys.executable, "-c", "raise SystemExit('no such database')"], {}, 1)
    with pytest.raises(UserError, match=r"mlflow did not answer at .*: no such database"):
        processes.wait(process, "http://127.0.0.1:1/health")


def test_secrets_are_private_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = stack.stack_environment(stack.Ports())["AWS_SECRET_ACCESS_KEY"]
    assert len(first) >= 32
    assert stack.stack_environment(stack.Ports())["AWS_SECRET_ACCESS_KEY"] == first
    assert stat.S_IMODE((tmp_path / ".local/s3/secret").stat().st_mode) == 0o600


def test_env_fills_only_what_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("# comment\nSVD_TEST_A=1=2\nSVD_TEST_B=3\n")
    monkeypatch.setenv("SVD_TEST_A", "")
    monkeypatch.delenv("SVD_TEST_A")
    monkeypatch.setenv("SVD_TEST_B", "mine")
    env_file.load_env()
    assert (os.environ["SVD_TEST_A"], os.environ["SVD_TEST_B"]) == ("1=2", "mine")


def test_down_without_anything_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert stack.down() == []
