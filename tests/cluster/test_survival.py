"""What goes wrong on a cluster is said in the state of the run that it happens to, and loses and doubles nothing."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import mlflow
import pytest
from cluster_stack import STORE, ClusterStack, assert_as_stored, kubectl, objects, pull_all, say, wait_until
from micro_project import micro_preset
from prefect import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.checking.waiting import say_why_it_waits
from svd import storage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2700)]
CHECK = "platform-check/check-cpu"


def test_a_missing_image_is_said_and_given_up(stack: ClusterStack) -> None:
    stack.hasten("give-up-missing-image", 20)
    run = stack.start(CHECK, image="svd-platform/worker-cpu:missing", image_pull_policy="IfNotPresent")
    said = stack.await_state(run, "ImagePullError", 120)
    assert "can't pull the pod's image" in said["message"]
    given_up = stack.await_state(run, "Failed", 120)
    assert "could not pull the pod's image" in given_up["message"]
    assert "svd-platform/worker-cpu:missing" in stack.said(run)
    say("a missing image: said and given up")


TAKEN_BY_NONE = {
    "Insufficient memory": {"memory_request": "9000Gi", "memory_limit": "9000Gi"},
    "node affinity/selector": {"node_selector": {"disk": "made-of-glass"}},
}


def test_a_pod_that_no_node_takes_says_why_and_can_be_cancelled(stack: ClusterStack) -> None:
    runs = {words: stack.start(CHECK, **variables) for words, variables in TAKEN_BY_NONE.items()}
    api = {
        PREFECT_API_URL: f"{stack.url('prefect')}/api",
        PREFECT_API_AUTH_STRING: stack.secret["PREFECT_API_AUTH_STRING"],
    }
    for words, run in runs.items():
        assert wait_until(lambda run=run, words=words: words in stack.said(run), 180)
        with temporary_settings(api), get_client(sync_client=True) as client:
            say_why_it_waits(client, client.read_flow_run(UUID(run)))
        assert words in stack.await_state(run, "Unschedulable", 10)["message"]
        stack.ask("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    for run in runs.values():
        stack.await_state(run, "Cancelled", 240)
    say("two pods that no node takes: said why, cancelled")


def test_a_pod_out_of_memory_is_crashed_and_says_so(stack: ClusterStack) -> None:
    run = stack.start(CHECK, memory_request="50Mi", memory_limit="100Mi")
    state = stack.await_state(run, "Crashed", 180)
    assert "OOM" in f"{state['message']} {stack.said(run)}"


def test_a_full_scratch_volume_ends_the_run_and_is_said(stack: ClusterStack) -> None:
    stack.set_preset(orbits__objects=500)
    run = stack.start("orbits/orbits", {"preset": "micro"}, scratch_size="200Ki")
    message = stack.await_state(run, "Failed", 300)["message"]
    assert "scratch volume (200Ki)" in message and "raise `scratch_size`" in message
    say("a full scratch volume: said")


STEPS = 400
STAGE = "image-pretraining"
WORK = f"{STORE}/work/micro/{STAGE}"


def long_phases(steps: int) -> list[dict[str, Any]]:
    """The phases of the stage, long enough to be disturbed; another number of steps makes another training."""
    return [phase | {"iterations": steps} for phase in micro_preset()["image_pretraining"]["phases"]]


def train(stack: ClusterStack, steps: int) -> tuple[str, str]:
    """Start a pipeline of one long training; return its run and the training's, once a checkpoint is in the store."""
    compute = {"validate_every": steps, "checkpoint_every": 10}
    stack.set_preset(image_pretraining__phases=long_phases(steps), compute__image_pretraining=compute)
    before = {entry.location for entry in storage.list_files(WORK)}
    run = stack.start_pipeline(f'stages=["{STAGE}"]')
    wait_until(lambda: stack.children(run), 300)
    (child,) = stack.children(run)

    def stored() -> bool:
        return any(entry.size > 10_000 for entry in storage.list_files(WORK) if entry.location not in before)

    wait_until(stored, 300)
    return run, str(child["id"])


def assert_finished(stack: ClusterStack, run: str, what: str, steps: int) -> None:
    """Wait until the pipeline has completed with what an earlier pod had done, and MLflow knows each of `steps` steps.

    A training logs 50 of them, evenly.
    """
    done = stack.wait(run, 900)
    assert done["state_type"] == "COMPLETED", stack.story(run)
    logs = [stack.said(child["id"]) for child in stack.children(run)]
    assert any("unfinished work brought from the store" in log for log in logs), stack.story(run)
    client = mlflow.MlflowClient(stack.url("mlflow"))
    experiment = client.get_experiment_by_name("stable-video-diffusion").experiment_id
    (parent,) = client.search_runs([experiment], f"tags.`prefect.flow_run_id` = '{run}'")
    (training,) = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert training.info.status == "FINISHED"
    logged = sorted(metric.step for metric in client.get_metric_history(training.info.run_id, "train_loss"))
    assert len(logged) == len(set(logged)), "doubled: steps of the training"
    assert logged == list(range(steps // 50, steps + 1, steps // 50))
    say(f"{what}: survived, {len(stack.children(run))} pods of the stage")


def assert_ended_once(stack: ClusterStack, run: str) -> None:
    """The one stage of the pipeline ended once."""
    ended = [child["state_type"] for child in stack.children(run)].count("COMPLETED")
    assert ended == 1, "doubled: the stage ended twice" if ended else "the stage never ended"


@pytest.mark.usefixtures("environment", "latents")
def test_a_killed_pod_goes_on_where_it_was(stack: ClusterStack) -> None:
    run, child = train(stack, STEPS)
    kubectl("delete", "pod", stack.pod_of(child), "--grace-period=0", "--force")
    assert_finished(stack, run, "a pod deleted without grace in training", STEPS)


@pytest.mark.usefixtures("environment", "latents")
def test_the_pod_of_a_drained_node_goes_on_where_it_was(stack: ClusterStack) -> None:
    run, child = train(stack, STEPS + 50)
    (pod,) = (pod for pod in objects("pods") if pod["metadata"]["name"] == stack.pod_of(child))
    node = pod["spec"]["nodeName"]
    kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=180s")
    kubectl("uncordon", node)
    assert_finished(stack, run, "a pod evicted in training from a drained node", STEPS + 50)


def disturb(stack: ClusterStack, stage: str, begun: Callable[[], bool], *how: str) -> str:
    """Run a stage in a pipeline and delete its pod as soon as `begun`; return the pipeline once it has completed."""
    run = stack.start_pipeline(f'stages=["{stage}"]', "force=true")
    wait_until(lambda: stack.children(run), 300)
    (child,) = stack.children(run)
    deadline = time.monotonic() + 300
    while not begun():
        assert time.monotonic() < deadline, stack.story(run)
        time.sleep(0.1)
    kubectl("delete", "pod", stack.pod_of(str(child["id"])), *how)
    assert stack.wait(run, 600)["state_type"] == "COMPLETED", stack.story(run)
    assert_ended_once(stack, run)
    say(f"{stage}: survived, {len(stack.children(run))} pods of the stage")
    return run


SLOW_TEXT = {"detector": "rapidocr", "width": 1536, "height": 1536, "box_threshold": 0.5}


def has_measured() -> bool:
    """Whether a snapshot in the store holds a unit that curation has measured."""
    work = f"{STORE}/work/micro/curation"
    manifests = [entry.location for entry in storage.list_files(work) if entry.location.endswith("/manifest.json")]
    return any(b"measured/" in storage.read_bytes(manifest) for manifest in manifests)


@pytest.mark.usefixtures("environment", "latents")
def test_a_pod_evicted_in_curation_goes_on_where_it_was(stack: ClusterStack) -> None:
    stack.set_preset(curation__text=SLOW_TEXT)  # so that it can't finish within the grace period of its pod
    run = disturb(stack, "curation", has_measured, "--wait=false")
    logs = [stack.said(child["id"]) for child in stack.children(run)]
    assert any("unfinished work brought from the store" in log for log in logs), stack.story(run)


@pytest.mark.usefixtures("environment", "latents")
def test_a_pod_killed_while_it_publishes_leaves_nothing_half(
    stack: ClusterStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.set_preset(image_pretraining__phases=long_phases(20))
    remote = f"{STORE}/dvc"
    before = len(list(storage.list_files(remote)))
    disturb(stack, STAGE, lambda: len(list(storage.list_files(remote))) > before, "--grace-period=0", "--force")
    monkeypatch.chdir(stack.empty_clone(tmp_path / "clone"))
    pull_all()
    assert_as_stored(STAGE)


@pytest.mark.usefixtures("environment", "latents")
def test_servers_that_go_away_cost_nothing(stack: ClusterStack) -> None:
    run, _ = train(stack, STEPS + 100)
    for server in ("app=prefect", "app=mlflow", "app=s3", "app=postgres", "app=worker-gpu", "app=worker-cpu"):
        kubectl("delete", "pod", f"--selector={server}", "--wait=true", "--timeout=120s")
        kubectl("wait", "pod", f"--selector={server}", "--for=condition=Ready", "--timeout=240s")
        say(f"{server} is back")
    stack.reopen()
    done = stack.wait(run, 900)
    assert done["state_type"] == "COMPLETED", stack.story(run)
    assert_ended_once(stack, run)


@pytest.mark.skipif("SVD_CLUSTER_NODE" not in os.environ, reason="SVD_CLUSTER_NODE names no command that stops a node")
@pytest.mark.usefixtures("environment", "latents")
@pytest.mark.parametrize(("break_it", "mend_it"), [("stop", "start"), ("cut", "heal")])
def test_a_node_that_is_lost_and_comes_back(stack: ClusterStack, break_it: str, mend_it: str) -> None:
    """Without heartbeats the run counts as crashed; its successor waits for the node, and for the lease."""
    node = shlex.split(os.environ["SVD_CLUSTER_NODE"])
    stack.hasten("crash-silent-runs", 60)
    steps = STEPS + (150 if break_it == "stop" else 200)
    run, child = train(stack, steps)
    subprocess.run([*node, break_it, "gpu"], check=True)
    try:
        stack.await_state(child, "Crashed", 300)
        say(f"{break_it}: the run counts as crashed")
    finally:
        subprocess.run([*node, mend_it, "gpu"], check=True)
    assert_finished(stack, run, f"{break_it} and {mend_it} of the node in training", steps)
