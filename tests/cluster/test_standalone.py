"""The standalone overlay runs the whole pipeline on a real cluster; `make test-cluster`.

The tests build on one another in this order.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import mlflow
import pytest
from cluster_stack import NAMESPACE, STORE, ClusterStack, assert_as_stored, kubectl, objects, pull_all, say, wait_until
from micro_project import ROOT

from flows.stages import PIPELINE, STAGES
from svd import storage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2700)]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
import socket, sys, time
time.sleep(15)  # policies reach a new pod some seconds after its start
for address in sys.argv[1:]:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=4).close()
        print(address, "open")
    except OSError as error:
        print(address, "closed")
"""


def restarts() -> dict[str, int]:
    return {
        pod["metadata"]["name"]: sum(c["restartCount"] for c in pod["status"].get("containerStatuses", []))
        for pod in objects("pods")
    }


def test_everything_starts_at_the_first_try(stack: ClusterStack) -> None:
    assert sum(restarts().values()) == 0, restarts()


def test_each_pool_is_checked_from_outside(stack: ClusterStack) -> None:
    said = stack.run("svd", "platform", "check")
    assert said.count("passed") == 2 * 5 and "FAILED" not in said, said


def test_the_nightly_is_scheduled(stack: ClusterStack) -> None:
    wanted = {
        "deployments": {"name": {"any_": ["nightly-evaluation"]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    assert wait_until(lambda: stack.ask("POST", "/flow_runs/filter", wanted), 180)


def test_every_stage_runs_in_its_own_pod_on_the_right_node(stack: ClusterStack, pipeline: str) -> None:
    children = stack.children(pipeline)
    assert [c["name"] for c in children] == [f"{name}-micro" for name in PIPELINE]
    assert all(c["state_type"] == "COMPLETED" for c in children)
    pods: dict[str, list[dict]] = {}
    for pod in objects("pods", "--selector=app.kubernetes.io/component=run"):
        pods.setdefault(pod["metadata"]["labels"]["prefect.io/flow-run-id"], []).append(pod)
    gpu_nodes = {n["metadata"]["name"] for n in objects("nodes") if "nvidia.com/gpu" in n["status"]["capacity"]}
    assert pods.keys() >= {pipeline, *(c["id"] for c in children)}
    for name, child in zip(PIPELINE, children, strict=True):
        (pod,) = pods[child["id"]]
        assert child["work_pool_name"] == STAGES[name].pool
        assert pod["spec"]["containers"][0]["image"].endswith(f"/worker-{STAGES[name].pool}:{stack.tag}")
        assert (pod["spec"]["nodeName"] in gpu_nodes) == (STAGES[name].pool == "gpu"), name
        assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
    assert sum(restarts().values()) == 0, restarts()
    say(f"{len(objects('pods'))} pods, {sum(restarts().values())} restarts")


@pytest.mark.usefixtures("environment", "pipeline")
def test_an_empty_clone_pulls_the_results_by_hash(
    stack: ClusterStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stack.empty_clone(tmp_path / "clone"))
    pull_all()
    for name in PIPELINE:
        assert_as_stored(name)
    assert Path("outputs/micro/report/report.html").is_file()


@pytest.mark.usefixtures("environment", "pipeline")
def test_mlflow_knows_runs_commit_and_artifacts(stack: ClusterStack, tmp_path: Path) -> None:
    client = mlflow.MlflowClient(stack.url("mlflow"))
    runs = client.search_runs([client.get_experiment_by_name("stable-video-diffusion").experiment_id])
    assert sorted(r.data.tags["stage"] for r in runs) == sorted([*PIPELINE, "full-pipeline"])
    assert {r.info.status for r in runs} == {"FINISHED"}
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    commits = {r.data.tags["git.commit"].removesuffix("-dirty") for r in runs}
    assert len(commits) == 1 and len(commits.pop()) == len(commit)
    for model in client.search_registered_models():
        version = client.get_model_version_by_alias(model.name, "candidate")
        assert "§" in str(version.description), "Postgres and MLflow agree on UTF-8"
    (report,) = [r.info.run_id for r in runs if r.data.tags["stage"] == "report"]
    assert "<html" in Path(client.download_artifacts(report, "report.html", str(tmp_path))).read_text()


@pytest.mark.usefixtures("pipeline")
def test_no_secret_can_be_read_from_prefect(stack: ClusterStack) -> None:
    blocks = str(stack.ask("POST", "/block_documents/filter", {"include_secrets": True}))
    pools = str(stack.ask("POST", "/work_pools/filter", {}))
    jobs = kubectl("get", "jobs", "--output", "yaml")
    for name, value in stack.secret.items():
        if len(value) > 20:
            assert value not in blocks and value not in pools and value not in jobs, name


def test_both_servers_ask_for_a_password(stack: ClusterStack) -> None:
    for name, path in (
        ("prefect", "/api/admin/version"),
        ("mlflow", "/api/2.0/mlflow/experiments/search?max_results=1"),
    ):
        assert httpx.get(f"{stack.url(name)}{path}").status_code == 401, name
        assert httpx.get(f"{stack.url(name)}{path}", auth=("svd", "wrong")).status_code == 401, name


@pytest.mark.usefixtures("pipeline")
def test_both_pages_load(stack: ClusterStack, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    say(f"screenshots in {tmp_path}")
    word = {"username": stack.secret["MLFLOW_TRACKING_USERNAME"], "password": stack.secret["MLFLOW_TRACKING_PASSWORD"]}
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{stack.url('prefect')}/")
        page.locator("input").first.fill(stack.secret["PREFECT_API_AUTH_STRING"])
        page.locator("button", has_text="Login").click()
        expect(page.get_by_text("Flow Runs").first).to_be_visible(timeout=60_000)
        page.goto(f"{stack.url('prefect')}/deployments")
        expect(page.get_by_text("full-pipeline").first).to_be_visible(timeout=60_000)
        page.screenshot(path=tmp_path / "prefect.png")
        page = browser.new_context(http_credentials=word, viewport={"width": 1400, "height": 900}).new_page()
        page.goto(f"{stack.url('mlflow')}/#/experiments")
        expect(page.get_by_text("stable-video-diffusion").first).to_be_visible(timeout=60_000)
        page.screenshot(path=tmp_path / "mlflow.png")
        browser.close()


def probe(namespace: str, labels: str, image: str, *addresses: str) -> set[str]:
    """Return the addresses that a pod with these labels can open a connection to."""
    container = {
        "name": "probe",
        "image": image,
        "args": ["python", "-c", PROBE, *addresses],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    user = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"restartPolicy": "Never", "securityContext": user, "containers": [container]}
    name, _, value = labels.partition("=")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "namespace": namespace, "labels": {name: value}},
        "spec": spec,
    }
    kubectl("apply", "--namespace", namespace, "--filename", "-", text=json.dumps(pod))
    try:
        kubectl("wait", "-n", namespace, "pod/probe", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=180s")
        said = kubectl("logs", "--namespace", namespace, "probe")
    finally:
        kubectl("delete", "--namespace", namespace, "pod/probe", "--wait")
    assert len(said.splitlines()) == len(addresses)
    return {line.split()[0] for line in said.splitlines() if line.endswith("open")}


def test_nothing_is_reachable_but_what_is_meant(stack: ClusterStack) -> None:
    image = f"svd-platform/servers:{stack.tag}"
    ips = {
        pod["metadata"]["labels"]["app"]: pod["status"]["podIP"]
        for pod in objects("pods")
        if "app" in pod["metadata"]["labels"]
    }
    doors = [
        f"{name}.{NAMESPACE}.svc:{port}"
        for name, port in (("prefect", 4200), ("mlflow", 5151), ("s3", 8333), ("postgres", 5432))
    ]
    closed = [f"{ips['s3']}:{port}" for port in (8888, 9333, 8080, 18333, 18888, 19333, 9327)]
    assert probe("default", "a=b", image, *doors, *closed) == set()
    assert probe(NAMESPACE, "a=b", image, *doors, *closed) == set()
    assert probe(NAMESPACE, "app.kubernetes.io/component=run", image, *doors, *closed) == set(doors[:3])


def test_run_again_it_skips_what_is_there(stack: ClusterStack, pipeline: str) -> None:
    begun = time.monotonic()
    again = stack.start_pipeline()
    assert stack.wait(again, 600)["state_type"] == "COMPLETED", stack.story(again)
    assert stack.children(again) == []
    say(f"run again: {time.monotonic() - begun:.0f} s, no stage ran")


def test_lineage_leads_from_a_model_to_its_sources_and_back(stack: ClusterStack, pipeline: str, tmp_path: Path) -> None:
    clone = stack.empty_clone(tmp_path / "clone")
    model = "svd-image-to-video/1"
    command = ("svd", "lineage", "--json", "--store", STORE)
    origin = json.loads(stack.run(*command, model, folder=clone))
    assert origin["run"]["stage"] == "image-to-video" and len(origin["run"]["commit"].split("-")[0]) == 40
    (catalogue,) = origin["catalogues"]
    source = catalogue["sources"][0][0]
    back = json.loads(stack.run(*command, "--source", source, folder=clone))
    assert [one["catalogue"] for one in back["found"]] == [catalogue["md5"]]
    models = {one["name"].split()[0]: one["relation"] for one in back["models"]}
    assert models[model] == "trained", models


@pytest.mark.usefixtures("environment", "pipeline")
def test_gc_frees_what_it_says_and_everything_still_pulls(
    stack: ClusterStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stack.empty_clone(tmp_path / "clone"))
    unneeded = f"{STORE}/dvc/files/md5/00/{'0' * 30}"
    storage.write_bytes(unneeded, b"x" * 1000)
    gc = ("svd", "gc", "--older-than", "0", "--store", STORE)
    (can,) = re.findall(r"([\d,]+) bytes can be freed", stack.run(*gc, folder=Path.cwd()))
    (freed,) = re.findall(r"([\d,]+) bytes freed", stack.run(*gc, "--delete", folder=Path.cwd()))
    assert can == freed and int(freed.replace(",", "")) >= 1000 and not storage.exists(unneeded)
    say(f"garbage: {freed} bytes freed, as said")
    pull_all()
    for name in PIPELINE:
        assert_as_stored(name)
