"""A clone of this repository with small presets and the real local stack on free ports, for the tests of the stack."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from micro_project import ROOT, micro_preset
from servers import BIN, free_ports

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
DIE_ONCE = """
import os, pathlib, signal
plain, order = pathlib.Path.rename, pathlib.Path(__file__).with_name("die-once-renaming")
def rename(self, target):
    if order.exists() and order.read_text() == str(target):
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, target)
pathlib.Path.rename = rename
"""


class StackProject:
    """The clone, its stack, and what a user or a broken machine does to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        (folder.parent / "prefect").mkdir()
        (folder / ".faults").mkdir()
        (folder / ".faults" / "sitecustomize.py").write_text(DIE_ONCE)
        names = ("prefect", "mlflow", "s3", "master", "volume", "filer", "admin")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.api = httpx.Client(base_url=f"http://127.0.0.1:{self.ports['prefect']}/api", timeout=60)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "AWS_", "SVD_"))}
        self.env = kept | {
            "PYTHONPATH": f"{folder}{os.pathsep}{folder / '.faults'}",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PREFECT_HOME": str(folder.parent / "prefect"),
            "OMP_NUM_THREADS": "1",
        }

    def preset(self, name: str, **changes: Any) -> None:
        """Write presets/<name>.yaml: the micro preset with changes."""
        values = micro_preset(name=name, **changes)
        (self.folder / "presets" / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def select(self, preset: str) -> None:
        """Make `preset` the one that the literal command runs."""
        (self.folder / "params.yaml").write_text(f"preset: {preset}\n")

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command as a user in the clone would; returns what it said."""
        result = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True)
        assert not check or result.returncode == 0, f"{command}: {result.stdout}\n{result.stderr}"
        return result.stdout + result.stderr

    def up(self) -> str:
        """`svd stack up` on the free ports; starts only what is missing."""
        return self.run("svd", "stack", "up", *(a for n, p in self.ports.items() for a in (f"--{n}", str(p))))

    def start_pipeline(self, *parameters: str) -> str:
        """The literal command, with parameters if any; returns the id of the flow run."""
        words = [word for parameter in parameters for word in ("-p", parameter)]
        said = self.run("prefect", "deployment", "run", "full-pipeline", *words)
        found = re.search(r"UUID: ([0-9a-f-]{36})", said)
        assert found, said
        return found.group(1)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """What the server answers; one that is away, or whose SQLite file is busy (status 503), is asked again."""
        deadline = time.monotonic() + 300
        while True:
            try:
                response = self.api.request(method, path, json=body)
                if response.status_code != 503:
                    return response.raise_for_status().json() if response.content else None
            except httpx.TransportError as error:
                assert time.monotonic() < deadline, f"{error}\n{self.logs()}"
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.5)

    def flow_run(self, run: str) -> dict[str, Any]:
        """A flow run as the server knows it."""
        return dict(self.ask("GET", f"/flow_runs/{run}"))

    def children(self, run: str) -> list[dict[str, Any]]:
        """The flow runs that `run` started, oldest first."""
        wanted = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return list(self.ask("POST", "/flow_runs/filter", wanted))

    def wait(self, run: str, seconds: float = 400) -> dict[str, Any]:
        """The flow run once it has ended."""
        deadline = time.monotonic() + seconds
        while True:
            if (found := self.flow_run(run))["state_type"] in FINAL:
                return found
            assert time.monotonic() < deadline, self.logs()
            time.sleep(1)

    def wait_until(self, what: Callable[[], Any], seconds: float = 240) -> Any:
        """What `what` returns once that is true."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)
        return found

    def said(self, run: str) -> str:
        """The log of a flow run as the server shows it, task runs included."""
        wanted = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return "\n".join(log["message"] for log in self.ask("POST", "/logs/filter", wanted))

    def kill(self, name: str) -> list[int]:
        """SIGKILL a process of the stack with all its descendants, as when a machine dies; returns their pids."""
        family = [self._process(name), *self._process(name).children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=10)
        return [process.pid for process in family]

    def kill_alone(self, name: str) -> None:
        """SIGKILL a process of the stack; its children live on."""
        process = self._process(name)
        process.kill()
        psutil.wait_procs([process], timeout=10)

    def kill_run(self, run: str) -> None:
        """SIGKILL the process of a flow run, and its children."""
        (leader,) = [
            p for p in self.processes() if p.environ().get("PREFECT__FLOW_RUN_ID") == run and os.getpgid(p.pid) == p.pid
        ]
        for process in (leader, *leader.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def die_once_renaming(self, target: str) -> None:
        """Let the first process that is about to rename something to `target` be killed."""
        (self.folder / ".faults" / "die-once-renaming").write_text(target)

    def hang(self, name: str, seconds: float) -> None:
        """Stop a process of the stack with its children for a while: it accepts connections and does not answer."""
        family = [self._process(name), *self._process(name).children(recursive=True)]
        for process in family:
            process.suspend()
        time.sleep(seconds)
        for process in family:
            process.resume()

    def _process(self, name: str) -> psutil.Process:
        record = self.folder / ".local" / "run" / f"{name}.json"
        return psutil.Process(yaml.safe_load(record.read_text())["pid"])

    def processes(self) -> list[psutil.Process]:
        """Every living process that was started for this stack."""
        mark, found = str(self.folder / ".local"), []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SVD_STACK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    def logs(self) -> str:
        """The ends of the stack's logs, for a failed assertion."""
        files = sorted((self.folder / ".local" / "log").glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in files)


@contextlib.contextmanager
def running(project: StackProject) -> Iterator[StackProject]:
    """The project with its stack up, and down again afterwards."""
    try:
        project.up()
        yield project
    finally:
        project.run("svd", "stack", "down", check=False)


def take_environment(project: StackProject, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Set the variables of the stack's `.env` in this process, too."""
    env = dict(line.split("=", 1) for line in (project.folder / ".env").read_text().splitlines())
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return env
