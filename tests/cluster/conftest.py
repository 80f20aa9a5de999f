"""One installation serves all tests here, in the order of their files and lines; it is removed at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from cluster_stack import ClusterStack, installed, say


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterStack]:
    with installed(tmp_path_factory.mktemp("cluster") / "kubernetes") as stack:
        yield stack


@pytest.fixture(scope="session")
def pipeline(stack: ClusterStack) -> str:
    """Run the literal command once and return the id of its flow run."""
    say("prefect deployment run full-pipeline")
    begun = time.monotonic()
    run = stack.start_pipeline()
    done = stack.wait(run, 2400)
    assert done["state_type"] == "COMPLETED", stack.story(run)
    say(f"the pipeline took {time.monotonic() - begun:.0f} s")
    return run


@pytest.fixture(scope="session")
def latents(stack: ClusterStack) -> None:
    """Run the stages up to `latents`, so that trainings can be started alone."""
    run = stack.start_pipeline('stages=["sources", "encoders", "curation", "autoencoder", "latents"]')
    assert stack.wait(run, 1500)["state_type"] == "COMPLETED", stack.story(run)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say of each fault of the drill what became of the work: survived, lost or doubled."""
    reports = [report for name in ("passed", "failed") for report in terminalreporter.stats.get(name, [])]
    for report in reports:
        module, _, test = report.nodeid.partition("::")
        if module.endswith("test_survival.py") and report.when == "call":
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message.partition("\n")[0] if crash else ""
            seen = "survived" if report.passed else "doubled" if "doubled" in why else "lost"
            fault = test.removeprefix("test_").replace("_", " ")
            terminalreporter.write_line(f"{fault:<60} {seen:<9} {report.duration:5.0f} s  {why}".rstrip())


@pytest.fixture
def environment(stack: ClusterStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables of a person who works with the stack in this process, too."""
    for name, value in stack.environment().items():
        monkeypatch.setenv(name, value)
