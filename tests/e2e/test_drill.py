"""A part of `make drill`: faults on the real local stack, and nothing is lost, and nothing done or told twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from drill import FAULTS, Drill, suffer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
PART = ("worker-cpu-running", "prefect-server", "mlflow-parent")  # `make drill` does all; it takes most of an hour


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    drill = Drill(tmp_path_factory.mktemp("drill"))
    with drill.stack():
        yield drill


@pytest.mark.parametrize("fault", PART)
def test_the_stack_survives(drill: Drill, fault: str) -> None:
    outcome = suffer(drill, fault)
    assert outcome.seen == "survived", f"{outcome}\n{drill.project.logs()}"


def test_there_are_twelve_faults() -> None:
    assert len(FAULTS) == 12 and set(PART) < set(FAULTS)
