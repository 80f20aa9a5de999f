"""The local stack: Prefect server and workers, MLflow, SeaweedFS S3; started from wheels alone, stopped by pid.

`up` writes `.env`, which Prefect, `svd` and `make` read, so that stock commands find the servers; `down` removes it.
State lies in `.local/`: run/ (one JSON file per process), log/, and the servers' data.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import boto3
from botocore.exceptions import ClientError
from rich.console import Console

from flows.stack.env_file import ENV_FILE, read_env
from flows.stack.lost_runs import schedule_lost_runs
from flows.stack.processes import Process, Processes, check_port
from flows.stack.server_setup import install_automations, limit_pipelines
from flows.stages import POOLS, Pool
from svd.core.errors import UserError
from svd.core.files import atomic_file

LOCAL = Path(".local")
BUCKET = "svd"
RUNS_AT_A_TIME: dict[Pool, int] = {"cpu": 4, "gpu": 1}  # one GPU stage; parents wait for their children in `cpu`
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
    admin: int = 23646


def _processes() -> Processes:
    return Processes(LOCAL)


def running() -> Iterator[Process]:
    """Yield the processes that `up` started and that still live."""
    yield from _processes().running()


def _tool(name: str) -> str:
    """Return the path of a command of this environment, whether or not it is activated."""
    return str(Path(sys.executable).parent / name)


def stack_environment(ports: Ports) -> dict[str, str]:
    """Return the content of `.env`: addresses and credentials of the stack. Existing credentials are kept."""
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
    """Return the secret of the S3 server's admin, made once and kept with its data."""
    path = LOCAL / "s3" / "secret"
    if not path.exists():
        _write_private(path, secrets.token_urlsafe(24))
    return path.read_text()


def _write_private(path: Path, text: str) -> None:
    """Write a file that only this user may read, in one rename."""
    with atomic_file(path, mode=0o600) as temporary:
        temporary.write_text(text)


def _start_s3(ports: Ports, env: dict[str, str]) -> Process:
    folder = LOCAL / "s3"
    identity = {
        "name": "admin",
        "credentials": [{"accessKey": env["AWS_ACCESS_KEY_ID"], "secretKey": env["AWS_SECRET_ACCESS_KEY"]}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    config = folder / "s3.json"
    _write_private(config, json.dumps({"identities": [identity]}))
    (folder / "data").mkdir(exist_ok=True)
    options = {
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "s3.config": config,
        "s3.port": ports.s3,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.autoCreateBucket": "false",
        "master.port": ports.master,
        "master.telemetry": "false",
        "volume.port": ports.volume,
        "filer.port": ports.filer,
        "admin.port": ports.admin,
        "admin.ui": "false",
        "webdav": "false",
    }
    command = [_tool("weed"), "mini", *(f"-{name}={value}" for name, value in options.items())]
    return _processes().spawn("s3", command, {}, ports.s3)


def _start_mlflow(ports: Ports, env: dict[str, str]) -> Process:
    folder = (LOCAL / "mlflow").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    command = [_tool("mlflow"), "server", "--host", "127.0.0.1", "--port", str(ports.mlflow), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", f"s3://{BUCKET}/mlflow"]
    extra = {"MLFLOW_S3_ENDPOINT_URL": env["AWS_ENDPOINT_URL"], "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    own = {k: v for k, v in env.items() if k != "MLFLOW_TRACKING_URI"}
    return _processes().spawn("mlflow", command, own | extra, ports.mlflow)


def _start_prefect(ports: Ports) -> Process:
    folder = (LOCAL / "prefect").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    env = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        "PREFECT_API_URL": f"http://127.0.0.1:{ports.prefect}/api",
    }
    command = [_tool("prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(ports.prefect)]
    return _processes().spawn("prefect", command, env, ports.prefect)


def _start_worker(pool: Pool, env: dict[str, str]) -> Process:
    command = [_tool("prefect"), "worker", "start", "--pool", pool, "--type", "process"]
    command += ["--limit", str(RUNS_AT_A_TIME[pool])]
    extra = {
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_CLIENT_MAX_RETRIES": "8",  # about eight minutes: a restarted server is waited for
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return _processes().spawn(f"worker-{pool}", [*command, "--name", f"local-{pool}"], env | extra, None)


def _make_bucket(env: dict[str, str]) -> None:
    session = boto3.Session(env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], region_name=env["AWS_REGION"])
    s3 = session.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"])

    def make() -> None:
        if BUCKET not in [b["Name"] for b in s3.list_buckets()["Buckets"]]:
            s3.create_bucket(Bucket=BUCKET)

    _soon(make)


def _soon(action: Callable[[], None], attempts: int = 20) -> None:
    """Try until the filer answers: SeaweedFS's S3 port does a moment before it."""
    for attempt in range(attempts):
        try:
            return action()
        except ClientError as error:
            if attempt + 1 == attempts:
                raise UserError(f"S3 refuses to make the bucket '{BUCKET}': {error}; see .local/log/s3.log") from None
            time.sleep(0.5)


def _prefect(*arguments: str, env: dict[str, str]) -> None:
    result = subprocess.run(
        [_tool("prefect"), "--no-prompt", *arguments], env=os.environ | env, capture_output=True, text=True, check=False
    )
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise UserError(f"`prefect {' '.join(arguments)}` failed: {lines[-1] if lines else result.returncode}")


def _deploy(env: dict[str, str]) -> None:
    for pool in POOLS:
        _prefect("work-pool", "create", pool, "--type", "process", "--overwrite", env=env)
    limit_pipelines(env["PREFECT_API_URL"])
    _prefect("deploy", "--all", env=env)
    install_automations(env["PREFECT_API_URL"])


def _use_dvc_remote(env: dict[str, str] | None) -> None:
    """Point DVC at the stack's S3 in .dvc/config.local, unless the project has another default.

    None: forget it again.
    """
    from flows.recording.dvc import set_local_remote

    if Path(".dvc").is_dir():
        set_local_remote("stack", f"s3://{BUCKET}/dvc" if env else None, env["AWS_ENDPOINT_URL"] if env else "")


def _select_ports(ports: Ports, alive: set[str]) -> Ports:
    """Return the given ports, which must be free, or the recorded ones when a part of the stack runs already."""
    record = LOCAL / "ports.json"
    if alive and record.exists():
        ports = Ports(**json.loads(record.read_text()))
    taken = {"prefect", "mlflow"} & alive
    for name, port in asdict(ports).items():
        ours = name in taken or ("s3" in alive and name not in ("prefect", "mlflow"))
        if not ours:
            check_port(port, name, f"svd stack up --{name}")
    LOCAL.mkdir(exist_ok=True)
    record.write_text(json.dumps(asdict(ports)))
    return ports


def up(ports: Ports) -> dict[str, str]:
    """Start what doesn't run yet, wait until it answers, deploy `prefect.yaml`, write `.env`; return the variables.

    A stack of which a part died is completed on its own ports. Raises UserError for a taken port and for a server that
    doesn't come up; what was started is then stopped again.
    """
    alive = {process.name for process in running()}
    for name in {"s3", "prefect", "mlflow"} - alive:
        _processes().stop_rest_of(name)  # MLflow's and Prefect's children outlive their parents and hold the ports
    ports = _select_ports(ports, alive)
    env = stack_environment(ports)
    try:
        with console.status("starting S3, MLflow, Prefect") as status:
            _start_missing(ports, env, alive, status.update)
    except BaseException:
        for process in list(running()):
            if process.name not in alive:
                _processes().stop(process)
        raise
    _use_dvc_remote(env)
    _write_private(ENV_FILE, "".join(f"{name}={value}\n" for name, value in env.items()))
    return env


def _start_missing(ports: Ports, env: dict[str, str], alive: set[str], say: Callable[[str], None]) -> None:
    processes = _processes()
    s3 = None if "s3" in alive else _start_s3(ports, env)
    prefect = None if "prefect" in alive else _start_prefect(ports)
    if s3:
        processes.wait(s3, env["AWS_ENDPOINT_URL"])
        _make_bucket(env)
    mlflow = None if "mlflow" in alive else _start_mlflow(ports, env)
    if prefect:
        processes.wait(prefect, f"{env['PREFECT_API_URL']}/health")
    described, deployed = hashlib.sha256(Path("prefect.yaml").read_bytes()).hexdigest(), LOCAL / "prefect" / "deployed"
    if not alive or not deployed.exists() or deployed.read_text() != described:
        say("creating pools and deployments")
        _deploy(env)
        deployed.write_text(described)
    for pool in POOLS:
        if f"worker-{pool}" not in alive:
            schedule_lost_runs(env["PREFECT_API_URL"], pool, processes.flow_runs())
            _start_worker(pool, env)
    if mlflow:
        say("waiting for MLflow")
        processes.wait(mlflow, f"{env['MLFLOW_TRACKING_URI']}/health")


def down() -> list[str]:
    """Stop exactly the processes that `up` started, workers first, and what they left behind; return their names."""
    manager = _processes()
    found = sorted(running(), key=lambda p: (not p.name.startswith("worker"), p.name == "s3"))
    for process in found:
        manager.stop(process)
    orphans = manager.stop_orphans()
    _use_dvc_remote(None)
    ENV_FILE.unlink(missing_ok=True)
    return [process.name for process in found] + ([f"{orphans} orphaned processes"] if orphans else [])
