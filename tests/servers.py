"""Real servers on free loopback ports for tests; each is stopped by its own pid."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import boto3

BIN = Path(sys.executable).parent
GRPC_OFFSET = 10_000


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Ports that are free together with the gRPC ports that SeaweedFS puts 10,000 above; below the ephemeral range."""
    found: list[int] = []
    candidates = random.Random(os.getpid() + time.time_ns()).sample(range(11_000, 22_000), 2_000)
    for port in candidates:
        if _free(port) and _free(port + GRPC_OFFSET):
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free ports")


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, patience: float = 240) -> None:
    """Until `url` answers anything; fails with the end of the log."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer: {log.read_text(errors='replace')[-2000:]}")


class Server:
    """A server process in a folder of its own that can be killed and started again on the same port."""

    def __init__(self, command: list[str], url: str, folder: Path, env: dict[str, str] | None = None) -> None:
        self.url = url
        self._command = command
        self._log = folder / "server.log"
        self._env = os.environ | (env or {})
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self.url, self._process, self._log)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the server and its children, and wait for the end unless it only stops or goes on."""
        assert self._process is not None
        os.killpg(self._process.pid, number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self._process.wait(timeout=60)

    def stop(self) -> None:
        """End it, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self.kill()


class S3Server(Server):
    """SeaweedFS with two identities: an admin, and one that may only read."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.key, self.secret = "admin", "admin-secret"
        self.reader, self.reader_secret = "reader", "reader-secret"
        s3, self.master, volume, self.filer, admin, debug = free_ports(6)
        config = folder / "s3.json"
        config.write_text(json.dumps({"identities": [self._identity(True), self._identity(False)]}))
        (folder / "data").mkdir(exist_ok=True)
        options = {
            "dir": folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.config": config,
            "s3.port": s3,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.autoCreateBucket": "false",
            "master.port": self.master,
            "master.telemetry": "false",
            "volume.port": volume,
            "filer.port": self.filer,
            "admin.port": admin,
            "admin.ui": "false",
            "debug.port": debug,
            "webdav": "false",
        }
        command = [str(BIN / "weed"), "mini", *(f"-{name}={value}" for name, value in options.items())]
        super().__init__(command, f"http://127.0.0.1:{s3}", folder)

    def _identity(self, admin: bool) -> dict[str, object]:
        name, secret = (self.key, self.secret) if admin else (self.reader, self.reader_secret)
        actions = ["Admin", "Read", "List", "Tagging", "Write"] if admin else ["Read", "List"]
        return {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": actions}

    def environment(self, reader: bool = False) -> dict[str, str]:
        """The variables that boto3, DVC, MLflow and svd/storage read."""
        key, secret = (self.reader, self.reader_secret) if reader else (self.key, self.secret)
        names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
        return dict(zip(names, (self.url, key, secret, "us-east-1"), strict=True))

    def make_bucket(self, name: str) -> None:
        """Create a bucket; the S3 port answers a moment before the filer behind it does."""
        client = self._client()
        for attempt in range(40):
            try:
                client.create_bucket(Bucket=name)
                return
            except Exception:
                if attempt == 39:
                    raise
                time.sleep(0.25)

    def delete_bucket(self, name: str) -> None:
        """Delete a bucket with all that is in it, if the server is up; SeaweedFS deletes a bucket that isn't empty."""
        if self._process is not None and self._process.poll() is None:
            self._client().delete_bucket(Bucket=name)

    def _client(self) -> Any:
        session = boto3.Session(self.key, self.secret, region_name="us-east-1")
        return session.client("s3", endpoint_url=self.url)


def mlflow_server(folder: Path, port: int, artifacts: str, env: dict[str, str]) -> Server:
    """A real MLflow server on SQLite that passes artifacts on to `artifacts`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", artifacts]
    extra = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    extra["MLFLOW_S3_ENDPOINT_URL"] = env["AWS_ENDPOINT_URL"]
    return Server(command, f"http://127.0.0.1:{port}/health", folder, env | extra)
