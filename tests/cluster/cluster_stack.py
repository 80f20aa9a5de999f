"""The standalone overlay on a real cluster, as the README installs it: a copy of the manifests with generated secrets.

KUBECONFIG names the cluster and DOCKER_HOST the engine that builds the images. SVD_TEST_IMAGE_TAG takes images that
exist instead; SVD_CLUSTER_LOAD is a command that brings images to the nodes (`kind load docker-image`, for example),
their names are appended; SVD_TEST_KEEP=1 leaves the stack running for a look.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from micro_project import ROOT, micro_preset
from servers import BIN, free_ports

from flows.recording import results_store
from flows.recording.dvc import hash_folder

NAMESPACE = "svd"
TARGETS = ("servers", "worker-cpu", "worker-gpu")
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
HOW = "set KUBECONFIG to one with a node that offers nvidia.com/gpu, and DOCKER_HOST to an engine (README, Kubernetes)"
_start = time.monotonic()


def say(text: str) -> None:
    """Print a line of progress with the seconds since the start; `make test-cluster` shows it at once."""
    print(f"[{time.monotonic() - _start:5.0f} s] {text}", file=sys.stderr, flush=True)


def kubectl(*arguments: str, check: bool = True, text: str | None = None) -> str:
    """Run kubectl in the stack's namespace and return what it said."""
    command = ["kubectl", "--namespace", NAMESPACE, *arguments]
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert not check or result.returncode == 0, f"{shlex.join(command)}:\n{result.stdout}{result.stderr}"
    return result.stdout


def objects(kind: str, *arguments: str) -> list[dict[str, Any]]:
    """Return the objects of a kind as the API server describes them."""
    return list(json.loads(kubectl("get", kind, "--output", "json", *arguments))["items"])


def require_cluster() -> None:
    """Fail in one line unless a cluster answers."""
    if subprocess.run(["kubectl", "get", "--raw", "/readyz"], capture_output=True, check=False).returncode:
        pytest.exit(f"no cluster answers; {HOW}", returncode=2)


def built_images() -> str:
    """Build the images, or take those of SVD_TEST_IMAGE_TAG; bring them to the nodes and return their tag."""
    tag = os.environ.get("SVD_TEST_IMAGE_TAG")
    if not tag:
        tag = "test"
        say("building the images")
        subprocess.run(["make", "--silent", "images", f"SVD_IMAGE_TAG={tag}"], cwd=ROOT, check=True, stdout=sys.stderr)
    if load := os.environ.get("SVD_CLUSTER_LOAD"):
        say("bringing the images to the nodes")
        images = [f"svd-platform/{target}:{tag}" for target in TARGETS]
        subprocess.run([*shlex.split(load), *images], check=True, stdout=sys.stderr)
    return tag


@dataclass
class ClusterStack:
    """The stack under test: its credentials, and the local ports that lead into it."""

    folder: Path
    tag: str
    secret: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    _forwards: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def write(self) -> None:
        """Copy the manifests and fill in what a user fills in."""
        shutil.copytree(ROOT / "infra" / "kubernetes", self.folder)
        overlay = self.folder / "standalone"
        password = secrets.token_hex(16)
        for example in overlay.glob("*.example.env"):
            lines = [
                f"{line}{password if line.startswith('POSTGRES') else secrets.token_hex(16)}"
                if line.endswith("=")
                else line
                for line in example.read_text().splitlines()
            ]
            target = example.with_name(example.name.replace(".example", ""))
            target.write_text(re.sub(r"PASSWORD\b(?!=)", password, "\n".join(lines)) + "\n")
            self.secret |= dict(line.split("=", 1) for line in target.read_text().splitlines() if line[0] != "#")
        image = self.folder / "image" / "image.env"
        image.write_text(re.sub(r"(?m)^SVD_IMAGE_TAG=.*$", f"SVD_IMAGE_TAG={self.tag}", image.read_text()))
        with (overlay / "environment.env").open("a") as stream:
            stream.write("SVD_PRESET=micro\nSVD_SNAPSHOT_SECONDS=2\n")

    def apply(self) -> None:
        """Install the stack with the preset `micro`, and wait until all of it is ready."""
        kubectl("apply", "--kustomize", str(self.folder / "standalone"))
        self.set_preset()
        for name in ("statefulset/postgres", "statefulset/s3", "deployment/prefect", "deployment/mlflow"):
            kubectl("rollout", "status", name, "--timeout=300s")
            say(f"{name} is ready")
        for name in ("deployment/worker-cpu", "deployment/worker-gpu"):
            kubectl("rollout", "status", name, "--timeout=300s")
            say(f"{name} is ready")

    def set_preset(self, **changes: Any) -> None:
        """Make the preset `micro`, with changes, the one that pods started from now on find."""
        preset = self.folder / "micro.yaml"
        preset.write_text(yaml.safe_dump(micro_preset(**changes), sort_keys=False))
        made = kubectl("create", "configmap", "svd-presets", f"--from-file={preset}", "--dry-run=client", "-o", "yaml")
        kubectl("apply", "--filename", "-", text=made)

    def empty_clone(self, folder: Path) -> Path:
        """Return a clone of this commit that has no results and uses the preset `micro`."""
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
        shutil.copy(self.folder / "micro.yaml", folder / "presets")
        (folder / "params.yaml").write_text("preset: micro\n")
        return folder

    def pod_of(self, run: str) -> str:
        """Return the name of the newest pod of a flow run; empty when it has none."""
        pods = objects("pods", f"--selector=prefect.io/flow-run-id={run}")
        return str(max(pods, key=lambda p: p["metadata"]["creationTimestamp"])["metadata"]["name"]) if pods else ""

    def forward(self) -> None:
        """Open local ports to Prefect, MLflow and S3 by `kubectl port-forward`."""
        services = {"prefect": 4200, "mlflow": 5151, "s3": 8333}
        ports = list(self.ports.values()) or free_ports(len(services))
        for (name, port), local in zip(services.items(), ports, strict=True):
            command = ["kubectl", "-n", NAMESPACE, "port-forward", f"service/{name}", f"{local}:{port}"]
            self._forwards.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            self.ports[name] = local
        for name, path in (("prefect", "/api/health"), ("mlflow", "/health"), ("s3", "/healthz")):
            wait_until(lambda url=f"{self.url(name)}{path}": httpx.get(url).is_success, 60)

    def reopen(self) -> None:
        """Open the local ports again: a forward ends with its pod."""
        for process in self._forwards:
            process.terminate()
            process.wait()
        self._forwards.clear()
        self.forward()

    def url(self, name: str) -> str:
        """Return the local address of a server."""
        return f"http://127.0.0.1:{self.ports[name]}"

    def environment(self) -> dict[str, str]:
        """Return the variables of a person who works with the stack through the local ports."""
        foreign = ("PREFECT_", "MLFLOW_", "AWS_", "SVD_")
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "PREFECT_API_AUTH_STRING")
        names += ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
        return (
            {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
            | {name: self.secret[name] for name in names}
            | {"PREFECT_API_URL": f"{self.url('prefect')}/api", "MLFLOW_TRACKING_URI": self.url("mlflow")}
            | {
                "AWS_ENDPOINT_URL": self.url("s3"),
                "AWS_REGION": "us-east-1",
                "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
            }
            | {"PATH": f"{BIN}:{os.environ['PATH']}"}
        )

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Return what Prefect's API answers."""
        user, _, password = self.secret["PREFECT_API_AUTH_STRING"].partition(":")
        response = httpx.request(
            method, f"{self.url('prefect')}/api{path}", json=body, auth=(user, password), timeout=60
        )
        return response.raise_for_status().json() if response.content else None

    def run(self, *command: str, folder: Path = ROOT) -> str:
        """Run a command in a folder as a person with the local ports would, and return what it said."""
        env = self.environment()
        result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{shlex.join(command)}:\n{result.stdout}{result.stderr}"
        return result.stdout

    def start_pipeline(self, *parameters: str) -> str:
        """Run the literal command, with parameters if any, and return the id of the flow run."""
        words = [word for parameter in parameters for word in ("-p", parameter)]
        said = self.run("prefect", "deployment", "run", "full-pipeline", *words)
        found = re.search(r"UUID: ([0-9a-f-]{36})", said)
        assert found, said
        return found.group(1)

    def start(self, name: str, parameters: dict[str, Any] | None = None, **job_variables: Any) -> str:
        """Start the deployment `name` (flow/deployment) with changes to its pod, and return the id of the flow run."""
        found = self.ask("GET", f"/deployments/name/{name}")
        deployment, given = found["id"], found["parameters"] | (parameters or {})
        body = {"parameters": given, "job_variables": job_variables, "state": {"type": "SCHEDULED"}}
        return str(self.ask("POST", f"/deployments/{deployment}/create_flow_run", body)["id"])

    def await_state(self, run: str, name: str, seconds: float) -> dict[str, Any]:
        """Return the state `name` (as Prefect's page shows it) of a flow run once it has it."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.TransportError):
                state = dict(self.ask("GET", f"/flow_runs/{run}")["state"])
                if state["name"] == name:
                    return state
            assert time.monotonic() < deadline, f"not {name} after {seconds:.0f} s:\n{self.story(run)}"
            time.sleep(1)

    def hasten(self, automation: str, seconds: int) -> None:
        """Let an automation that waits act after `seconds`."""
        wanted = {"automations": {"name": {"any_": [automation]}}}
        (found,) = self.ask("POST", "/automations/filter", wanted)
        changed = {name: found[name] for name in ("name", "description", "enabled", "trigger", "actions")}
        changed["trigger"] |= {"within": seconds}
        self.ask("PUT", f"/automations/{found['id']}", changed)

    def wait(self, run: str, seconds: float) -> dict[str, Any]:
        """Return the flow run once it has ended; each of its stages is told as it ends."""
        told: set[str] = set()
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.TransportError):
                for child in self.children(run):
                    if child["state_type"] in FINAL and child["id"] not in told:
                        told.add(child["id"])
                        say(f"{child['name']}: {child['state_name']} after {child['total_run_time']:.0f} s")
                found = dict(self.ask("GET", f"/flow_runs/{run}"))
                if found["state_type"] in FINAL:
                    return found
            assert time.monotonic() < deadline, f"not done after {seconds:.0f} s:\n{self.story(run)}"
            time.sleep(3)

    def children(self, run: str) -> list[dict[str, Any]]:
        """Return the flow runs that `run` started, oldest first."""
        wanted = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return list(self.ask("POST", "/flow_runs/filter", wanted))

    def said(self, run: str) -> str:
        """Return the log of a flow run."""
        wanted = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return "\n".join(log["message"] for log in self.ask("POST", "/logs/filter", wanted))

    def story(self, run: str) -> str:
        """Return what is known of a run that went wrong: logs, pods and events."""
        logs = "\n".join(
            f"--- {r['name']}\n{self.said(r['id'])}" for r in [{"name": "pipeline", "id": run}, *self.children(run)]
        )
        events = kubectl("get", "events", "--sort-by=.lastTimestamp")
        return f"{logs}\n{kubectl('get', 'pods', '-o', 'wide')}\n{events[-3000:]}"

    def close(self) -> None:
        """Close the ports and remove all that was installed, unless SVD_TEST_KEEP is set."""
        for process in self._forwards:
            process.terminate()
            process.wait()
        if not os.environ.get("SVD_TEST_KEEP"):
            say("removing the stack")
            kubectl(
                "delete",
                "--kustomize",
                str(self.folder / "standalone"),
                "--ignore-not-found",
                "--timeout=180s",
                check=False,
            )


STORE = "s3://svd/results"


def pull_all() -> None:
    """Bring all results of the preset `micro` from the store into the clone that is the working folder, by hash."""
    results_store.fetch_locks(STORE, "micro")
    remote = ["remote", "add", "--local", "--default", "results", f"{STORE}/dvc"]
    for command in (remote, ["pull", "--quiet", "--allow-missing"]):
        subprocess.run([str(BIN / "dvc"), *command], check=True)


def assert_as_stored(stage: str) -> None:
    """The output of the stage in the working folder has the hash that the store names."""
    stored = results_store.stored_output(STORE, "micro", stage)
    assert stored is not None and hash_folder(Path(stored.path)).md5 == stored.md5, stage


def wait_until(what: Callable[[], Any], seconds: float) -> Any:
    """Return what `what` returns once that is true; a server that does not answer yet is asked again."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            if found := what():
                return found
        assert time.monotonic() < deadline, f"never happened within {seconds:.0f} s"
        time.sleep(1)


@contextlib.contextmanager
def installed(folder: Path) -> Iterator[ClusterStack]:
    """Install the stack, open its ports, and remove it at the end."""
    require_cluster()
    if kubectl("get", "namespace", NAMESPACE, "--ignore-not-found"):
        pytest.exit(
            f"namespace {NAMESPACE} exists; the test would remove it: `kubectl delete namespace {NAMESPACE}`", 2
        )
    stack = ClusterStack(folder, built_images())
    try:
        stack.write()
        stack.apply()
        stack.forward()
        yield stack
    finally:
        stack.close()
