"""The local stack: Prefect server and workers, MLflow, SeaweedFS S3; started from wheels alone, stopped by pid.

`up` writes `.env`, which Prefect, `svd` and `make` read, so that stock commands find the servers; `down` removes it.
State lies in `.local/`: run/ (one JSON file a process), log/, and the servers' data.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import boto3
import psutil
from rich.console import Console

from svd.stage import UserError

LOCAL = Path(".local")
ENV_FILE = Path(".env")
PATIENCE = 240
BUCKET = "svd"
console = Console(stderr=True)


@dataclass(frozen=True)
class Ports:
    """Ports of the stack, all on loopback; SeaweedFS also opens each of its own ports + 10000."""

    prefect: int = 4200
    mlflow: int = 5151
    s3: int = 8333
    master: int = 9333
    volume: int = 9340
    filer: int = 9388


@dataclass(frozen=True)
class Process:
    """A process of ours, identified by pid and start time, so that a reused pid is never stopped."""

    name: str
    pid: int
    started: float
    port: int | None


def _run_folder() -> Path:
    return LOCAL / "run"


def running() -> Iterator[Process]:
    """The processes that `up` started and that still live."""
    for path in sorted(_run_folder().glob("*.json")):
        process = Process(**json.loads(path.read_text()))
        if _alive(process):
            yield process


def _alive(process: Process) -> bool:
    try:
        found = psutil.Process(process.pid)
        return abs(found.create_time() - process.started) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_port(port: int, name: str) -> None:
    """Raises UserError that names the process that holds `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            return
        except OSError:
            pass
    holder = next((c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.pid), None)
    who = f"process {holder} ({psutil.Process(holder).name()})" if holder else "another user's process"
    raise UserError(
        f"port {port} for {name} is taken by {who}; stop it, or choose another with `svd stack up --{name} PORT`"
    )


def _spawn(name: str, command: list[str], env: dict[str, str], port: int | None) -> Process:
    (LOCAL / "log").mkdir(parents=True, exist_ok=True)
    _run_folder().mkdir(parents=True, exist_ok=True)
    with (LOCAL / "log" / f"{name}.log").open("ab") as log:
        child = subprocess.Popen(
            command, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    process = Process(name, child.pid, psutil.Process(child.pid).create_time(), port)
    (_run_folder() / f"{name}.json").write_text(json.dumps(asdict(process)))
    return process


def _wait(process: Process, url: str) -> None:
    """Until `url` answers anything; raises UserError with the log's last line when the process ends or time is up."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            if not _alive(process):
                break
            time.sleep(0.5)
    log = LOCAL / "log" / f"{process.name}.log"
    lines = log.read_text(errors="replace").strip().splitlines()
    raise UserError(f"{process.name} did not answer at {url}; see {log}: {lines[-1] if lines else 'empty'}")


def _tool(name: str) -> str:
    """A command of this environment, whether or not it is activated."""
    return str(Path(sys.executable).parent / name)


def environment(ports: Ports) -> dict[str, str]:
    """What `.env` holds: addresses and credentials of the stack. Existing credentials are kept."""
    old = read_env()
    return {
        "PREFECT_API_URL": f"http://127.0.0.1:{ports.prefect}/api",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports.mlflow}",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports.s3}",
        "AWS_ACCESS_KEY_ID": old.get("AWS_ACCESS_KEY_ID", "svd"),
        "AWS_SECRET_ACCESS_KEY": old.get("AWS_SECRET_ACCESS_KEY") or _stored_secret(),
        "AWS_REGION": "us-east-1",
        "SVD_HOME": str(Path.cwd()),
    }


def _stored_secret() -> str:
    """The secret of the S3 server's admin, made once and kept with its data."""
    path = LOCAL / "s3" / "secret"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(24))
    return path.read_text()


def read_env(path: Path = ENV_FILE) -> dict[str, str]:
    """The variables of a `.env` file; none when there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def load_env() -> None:
    """Take over `.env` where the environment says nothing else."""
    for name, value in read_env().items():
        os.environ.setdefault(name, value)


def _write_env(values: dict[str, str]) -> None:
    temporary = ENV_FILE.with_name(".env.tmp")
    temporary.touch(mode=0o600)
    temporary.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    temporary.replace(ENV_FILE)


def _start_s3(ports: Ports, env: dict[str, str]) -> Process:
    folder = LOCAL / "s3"
    identity = {
        "name": "admin",
        "credentials": [{"accessKey": env["AWS_ACCESS_KEY_ID"], "secretKey": env["AWS_SECRET_ACCESS_KEY"]}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    config = folder / "s3.json"
    config.touch(mode=0o600)
    config.write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir(exist_ok=True)
    options = {
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "s3.config": config,
        "master.port": ports.master,
        "volume.port": ports.volume,
        "filer.port": ports.filer,
        "s3.port": ports.s3,
        "webdav": "false",
        "admin.ui": "false",
        "s3.port.iceberg": 0,
        "master.telemetry": "false",
    }
    command = [_tool("weed"), "mini", *(f"-{name}={value}" for name, value in options.items())]
    return _spawn("s3", command, {}, ports.s3)


def _start_mlflow(ports: Ports, env: dict[str, str]) -> Process:
    folder = (LOCAL / "mlflow").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    command = [_tool("mlflow"), "server", "--host", "127.0.0.1", "--port", str(ports.mlflow), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", f"s3://{BUCKET}/mlflow"]
    extra = {"MLFLOW_S3_ENDPOINT_URL": env["AWS_ENDPOINT_URL"], "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    own = {k: v for k, v in env.items() if k != "MLFLOW_TRACKING_URI"}
    return _spawn("mlflow", command, own | extra | {"MLFLOW_DISABLE_TELEMETRY": "true"}, ports.mlflow)


def _start_prefect(ports: Ports) -> Process:
    folder = (LOCAL / "prefect").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    env = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_API_URL": f"http://127.0.0.1:{ports.prefect}/api",
    }
    command = [_tool("prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(ports.prefect)]
    return _spawn("prefect", command, env, ports.prefect)


def _start_workers(env: dict[str, str]) -> None:
    # one GPU stage at a time; the pool `cpu` also holds the parents, which wait for their children
    for pool, limit in (("cpu", 4), ("gpu", 1)):
        command = [_tool("prefect"), "worker", "start", "--pool", pool, "--type", "process", "--limit", str(limit)]
        extra = {"PREFECT_WORKER_QUERY_SECONDS": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        _spawn(f"worker-{pool}", [*command, "--name", f"local-{pool}"], env | extra, None)


def _make_bucket(env: dict[str, str]) -> None:
    session = boto3.Session(env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], region_name=env["AWS_REGION"])
    s3 = session.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"])
    if BUCKET not in [b["Name"] for b in s3.list_buckets()["Buckets"]]:
        s3.create_bucket(Bucket=BUCKET)


def _prefect(*arguments: str, env: dict[str, str]) -> None:
    result = subprocess.run(
        [_tool("prefect"), "--no-prompt", *arguments], env=os.environ | env, capture_output=True, text=True, check=False
    )
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise UserError(f"`prefect {' '.join(arguments)}` failed: {lines[-1] if lines else result.returncode}")


def up(ports: Ports) -> dict[str, str]:
    """Start everything, wait until it answers, deploy `prefect.yaml`, write `.env`; returns the variables.

    Raises UserError for a taken port and for a server that doesn't come up; what was started is then stopped again.
    """
    if alive := [process.name for process in running()]:
        raise UserError(f"already running: {', '.join(alive)}; `make status` shows them, `make down` stops them")
    for name, port in asdict(ports).items():
        check_port(port, name)
    env = environment(ports)
    try:
        with console.status("starting S3, MLflow, Prefect") as status:
            s3, prefect = _start_s3(ports, env), _start_prefect(ports)
            _wait(s3, env["AWS_ENDPOINT_URL"])
            _make_bucket(env)
            mlflow = _start_mlflow(ports, env)
            _wait(prefect, f"{env['PREFECT_API_URL']}/health")
            status.update("creating pools and deployments")
            for pool in ("cpu", "gpu"):
                _prefect("work-pool", "create", pool, "--type", "process", "--overwrite", env=env)
            _prefect("deploy", "--all", env=env)
            _start_workers(env)
            status.update("waiting for MLflow")
            _wait(mlflow, f"{env['MLFLOW_TRACKING_URI']}/health")
    except BaseException:
        down()
        raise
    _write_env(env)
    return env


def down() -> list[str]:
    """Stop exactly the processes that `up` started, workers first; returns their names."""
    processes = sorted(running(), key=lambda p: (not p.name.startswith("worker"), p.name == "s3"))
    for process in processes:
        _stop(process)
    for path in _run_folder().glob("*.json"):
        path.unlink()
    ENV_FILE.unlink(missing_ok=True)
    return [process.name for process in processes]


def _stop(process: Process) -> None:
    """Terminate the process and its session; kill what is left after 15 s."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=15)
    for survivor in left:
        survivor.kill()
    psutil.wait_procs(left, timeout=5)
