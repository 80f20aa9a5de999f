"""One table of stages: dvc.yaml, prefect.yaml, the flows and the code agree with it."""

import importlib
from pathlib import Path

import pytest
import yaml

from flows.dispatch import stage_flow
from flows.stages import BRANCHES, PIPELINE, STAGES, find_stage
from svd.stage import UserError

ROOT = Path(__file__).parents[2]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
DVC |= yaml.safe_load((ROOT / "branches" / "dvc.yaml").read_text())["stages"]
PREFECT = {d["name"]: d for d in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}


@pytest.mark.parametrize("name", STAGES)
def test_dvc_lists_the_stage_with_its_inputs_and_output(name: str) -> None:
    entry = DVC[name]
    data = {dep for dep in entry["deps"] if dep.startswith("outputs/")}
    assert data == {f"outputs/${{preset}}/{stage}" for stage in STAGES[name].inputs}
    outs = [next(iter(out)) if isinstance(out, dict) else out for out in entry["outs"]]
    assert outs == [f"outputs/${{preset}}/{name}"]
    assert entry["cmd"] == f"svd stage {name} --preset ${{preset}}"
    missing = [dep for dep in entry["deps"] if not dep.startswith("outputs/") and not (ROOT / dep).exists()]
    assert not missing


@pytest.mark.parametrize("name", STAGES)
def test_dvc_depends_on_the_module_that_runs_the_stage(name: str) -> None:
    module = STAGES[name].module.replace(".", "/")
    assert any(f"{module}.py".startswith(dep.removesuffix("/")) for dep in DVC[name]["deps"])


@pytest.mark.parametrize("name", STAGES)
def test_the_flow_and_its_deployment_exist(name: str) -> None:
    flow = stage_flow(name)
    assert flow.name == name
    path, function = PREFECT[name]["entrypoint"].split(":")
    assert getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), function) is flow
    assert PREFECT[name]["work_pool"]["name"] == STAGES[name].pool


@pytest.mark.parametrize("name", STAGES)
def test_the_function_that_runs_the_stage_exists(name: str) -> None:
    assert callable(STAGES[name].load())


def test_inputs_come_before_the_stage_that_reads_them() -> None:
    order = [*PIPELINE, *BRANCHES]
    assert all(order.index(i) < order.index(name) for name in order for i in STAGES[name].inputs)


def test_nightly_evaluation_is_scheduled() -> None:
    schedule = PREFECT["nightly-evaluation"]["schedules"][0]
    assert (schedule["cron"], schedule["timezone"], schedule["active"]) == ("0 2 * * *", "UTC", True)


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(UserError, match="curation"):
        find_stage("curatoin")
