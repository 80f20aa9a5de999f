"""Background processes of ours, remembered in files, recognised after a restart of this program, stopped by pid."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from svd.core.errors import UserError
from svd.core.files import write_text

PATIENCE = 240
GRACE = 15
MARK = "SVD_STACK"
FLOW_RUN = "PREFECT__FLOW_RUN_ID"  # set by Prefect's worker
PART = "SVD_STACK_PART"  # which of the stack's processes one belongs to


@dataclass(frozen=True)
class Process:
    """A process of ours, identified by pid and start time, so that a reused pid is never stopped."""

    name: str
    pid: int
    started: float
    port: int | None


class Processes:
    """The processes that belong to `folder`: run/<name>.json describes one, log/<name>.log holds its output.

    Their environment carries a mark, which their children inherit: so the orphans of a killed worker are found, too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark = str(folder.absolute())

    def running(self) -> Iterator[Process]:
        """Yield the processes that live; files of ones that are gone are removed."""
        for path in sorted((self.folder / "run").glob("*.json")):
            process = Process(**json.loads(path.read_text()))
            if is_alive(process):
                yield process
            else:
                path.unlink(missing_ok=True)

    def spawn(self, name: str, command: list[str], env: dict[str, str], port: int | None) -> Process:
        """Start a command in a session of its own."""
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        (self.folder / "run").mkdir(parents=True, exist_ok=True)
        environment = os.environ | env | {MARK: self._mark, PART: name}
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        process = Process(name, child.pid, psutil.Process(child.pid).create_time(), port)
        target = self.folder / "run" / f"{name}.json"
        write_text(target, json.dumps(asdict(process)))
        return process

    def wait(self, process: Process, url: str) -> None:
        """Wait until `url` answers; raises UserError with the log's last line when the process ends or time is up."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(url, timeout=5)
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                if not is_alive(process):
                    break
                time.sleep(0.5)
        log = self.folder / "log" / f"{process.name}.log"
        lines = log.read_text(errors="replace").strip().splitlines()
        raise UserError(f"{process.name} did not answer at {url}; see {log}: {lines[-1] if lines else 'empty'}")

    def stop(self, process: Process) -> None:
        """Terminate a process and its children; kill what is left after 15 s."""
        try:
            own = psutil.Process(process.pid)
            family = [own, *own.children(recursive=True)]
            os.killpg(process.pid, signal.SIGTERM)
        except (psutil.NoSuchProcess, ProcessLookupError):
            family = []
        _kill(psutil.wait_procs(family, timeout=GRACE)[1])
        (self.folder / "run" / f"{process.name}.json").unlink(missing_ok=True)

    def stop_orphans(self) -> int:
        """Stop marked processes whose parents are gone; return how many there were."""
        return _terminate([process for process, _ in self._marked()])

    def stop_rest_of(self, name: str) -> int:
        """Stop what a dead process called `name` left behind and what may hold its port; return how many there were."""
        return _terminate([process for process, env in self._marked() if env.get(PART) == name])

    def flow_runs(self) -> set[str]:
        """Return the ids of the Prefect flow runs that live, whether or not their worker does.

        A flow run leads a process group; what only its children keep alive is no run any more.
        """
        marked = ((process.pid, env.get(FLOW_RUN)) for process, env in self._marked())
        return {run for pid, run in marked if run and os.getpgid(pid) == pid}

    def _marked(self) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        """Yield the living processes of this stack with their environments."""
        for process in psutil.process_iter():
            try:
                env = process.environ()
                if process.pid != os.getpid() and env.get(MARK) == self._mark and _lives(process):
                    yield process, env
            except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
                continue


def _lives(process: psutil.Process) -> bool:
    return bool(process.status() != psutil.STATUS_ZOMBIE)


def _terminate(processes: list[psutil.Process]) -> int:
    """Terminate processes, kill what is left after 15 s; return how many there were."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _kill(psutil.wait_procs(processes, timeout=GRACE)[1])
    return len(processes)


def _kill(processes: list[psutil.Process]) -> None:
    for survivor in processes:
        try:
            survivor.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=5)


def is_alive(process: Process) -> bool:
    """Return whether this very process lives: same pid, same start."""
    try:
        found = psutil.Process(process.pid)
        return abs(found.create_time() - process.started) < 1 and _lives(found)
    except psutil.NoSuchProcess:
        return False


def check_port(port: int, name: str, option: str) -> None:
    """Check that `port` is free; raises UserError that names its holder, and the option that sets another."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            return
        except OSError:
            pass
    holder = next((c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.pid), None)
    who = f"process {holder} ({psutil.Process(holder).name()})" if holder else "another user's process"
    raise UserError(f"port {port} for {name} is taken by {who}; stop it, or choose another with `{option} PORT`")
