"""A clone of this repository with small presets and the real local stack on free ports, for tests/e2e/test_stack.py."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from servers import BIN, free_ports

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "sources.paths": [],
    "sources.synthetic.train_videos": 2,
    "sources.synthetic.test_videos": 1,
    "sources.synthetic.scenes_per_video": 2,
    "orbits.objects": 1,
}
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class StackProject:
    """The clone, its stack, and what a user or a broken machine does to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        names = ("prefect", "mlflow", "s3", "master", "volume", "filer", "admin")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.api = httpx.Client(base_url=f"http://127.0.0.1:{self.ports['prefect']}/api", timeout=60)
        self._shorten_silence()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "AWS_", "SVD_"))}
        self.env = kept | {
            "PYTHONPATH": str(folder),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PREFECT_HOME": str(folder / ".cache" / "prefect"),
            "OMP_NUM_THREADS": "1",
        }

    def _shorten_silence(self) -> None:
        path = self.folder / "infra" / "prefect" / "automations.yaml"
        text = path.read_text()
        assert "within: 120" in text
        path.write_text(text.replace("within: 120", "within: 60"))

    def preset(self, name: str, changes: dict[str, Any]) -> None:
        """Write presets/<name>.yaml: the small preset with changes."""
        values = yaml.safe_load((self.folder / "presets" / "tiny.yaml").read_text())
        for dotted, value in (SMALL | {"name": name} | changes).items():
            *parents, last = dotted.split(".")
            functools.reduce(lambda section, key: section[key], parents, values)[last] = value
        (self.folder / "presets" / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command as a user in the clone would; returns what it said."""
        result = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True)
        assert not check or result.returncode == 0, f"{command}: {result.stdout}\n{result.stderr}"
        return result.stdout + result.stderr

    def up(self) -> str:
        """`svd stack up` on the free ports; starts only what is missing."""
        return self.run("svd", "stack", "up", *(a for n, p in self.ports.items() for a in (f"--{n}", str(p))))

    def start_pipeline(self, preset: str, stages: str, *parameters: str) -> str:
        """The literal command; returns the id of the flow run."""
        options = [f"preset={preset}", f"stages={stages}", *parameters]
        words = [word for option in options for word in ("-p", option)]
        said = self.run("prefect", "deployment", "run", "full-pipeline", *words)
        found = re.search(r"UUID: ([0-9a-f-]{36})", said) or re.search(r"([0-9a-f]{8}-[0-9a-f-]{27})", said)
        assert found, said
        return found.group(1)

    def flow_run(self, run: str) -> dict[str, Any]:
        """A flow run as the server knows it."""
        return dict(self.api.get(f"/flow_runs/{run}").raise_for_status().json())

    def children(self, run: str) -> list[dict[str, Any]]:
        """The flow runs that `run` started, oldest first."""
        wanted = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return list(self.api.post("/flow_runs/filter", json=wanted).raise_for_status().json())

    def wait(self, run: str, seconds: float = 300) -> dict[str, Any]:
        """The flow run once it has ended."""
        deadline = time.monotonic() + seconds
        while (found := self.flow_run(run))["state_type"] not in FINAL:
            assert time.monotonic() < deadline, f"{found['name']} is still {found['state_name']}\n{self.logs()}"
            time.sleep(1)
        return found

    def wait_for_child(self, run: str, seconds: float = 180) -> dict[str, Any]:
        """The first child of `run` that is Running."""
        deadline = time.monotonic() + seconds
        while not (found := [c for c in self.children(run) if c["state_type"] == "RUNNING"]):
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.5)
        return found[0]

    def kill(self, name: str) -> list[int]:
        """SIGKILL a process of the stack with all its descendants, as when a machine dies; returns their pids."""
        pid = int(yaml.safe_load((self.folder / ".local" / "run" / f"{name}.json").read_text())["pid"])
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=10)
        return [process.pid for process in family]

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
