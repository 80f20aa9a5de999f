"""Ctrl-C and SIGKILL on `svd pipeline`: it ends at once, and nothing of it lives on."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
from micro_project import Project, Running, make_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("interrupted") / "project", encoders__toy_iterations=2000)


def at_work(project: Project) -> Running:
    """`svd pipeline`, once it trains the encoders."""
    command = project.start("svd", "pipeline")
    command.until(lambda: any(project.work.glob("encoders/*/*.pt")))
    return command


def living(project: Project) -> list[psutil.Process]:
    """The processes that were started in the project, its temporary Prefect server among them."""
    home, found = project.environment()["PREFECT_HOME"], []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT_HOME") == home and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_an_interrupted_pipeline_ends_soon_in_one_line(project: Project) -> None:
    command = at_work(project)
    assert len(living(project)) >= 2, "it has no server of its own"
    start = time.monotonic()
    os.killpg(command.process.pid, signal.SIGINT)  # as the terminal does
    said = command.finish(code=130)
    assert time.monotonic() - start < 20, said[-2000:]  # 6 s on an idle machine; 77 s when its server died first
    assert "Traceback" not in said, said[-4000:]
    assert "interrupted; the same command goes on" in said
    assert living(project) == []


def test_a_killed_pipeline_leaves_no_server(project: Project) -> None:
    command = at_work(project)
    command.process.kill()
    command.process.wait()
    deadline = time.monotonic() + 15
    while left := living(project):
        assert time.monotonic() < deadline, [process.cmdline() for process in left]
        time.sleep(0.2)
