"""One table of stages: dvc.yaml, prefect.yaml, the flows and the code agree with it."""

import importlib
from pathlib import Path

import pytest
import yaml

from flows.prefect_flows.dispatch import stage_flow
from flows.rendering.files import stale_files
from flows.stages import BRANCHES, PIPELINE, STAGES, find_stage
from svd.config import Preset
from svd.core.errors import UserError

ROOT = Path(__file__).parents[2]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
DVC |= yaml.safe_load((ROOT / "branches" / "dvc.yaml").read_text())["stages"]
PREFECT = {d["name"]: d for d in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}


def test_the_files_are_what_the_table_makes() -> None:
    assert not stale_files(ROOT), "run `svd platform render`"


def test_the_files_are_equal_bytes_every_time(tmp_path: Path) -> None:
    from flows.rendering.files import FILES, write_files

    assert write_files(tmp_path) == list(FILES)
    assert write_files(tmp_path) == []
    (tmp_path / "dvc.yaml").write_text("vars: []\n")
    assert stale_files(tmp_path) == [Path("dvc.yaml")]
    assert all((tmp_path / name).read_text().startswith("# made by `svd platform render`") for name in list(FILES)[1:])


@pytest.mark.parametrize("name", STAGES)
def test_dvc_lists_the_stage_with_its_inputs_and_output(name: str) -> None:
    entry = DVC[name]
    made = {f"outputs/${{preset}}/{stage}" for stage in STAGES[name].inputs}
    made |= {f"outputs/${{preset}}/inventory/{name}.json"}
    assert set(entry["deps"]) == made, "inputs and the inventory, and no source file"
    outs = [next(iter(out)) if isinstance(out, dict) else out for out in entry["outs"]]
    assert outs == [f"outputs/${{preset}}/{name}"]
    assert entry["cmd"] == f"svd stage {name} --preset ${{preset}}"


@pytest.mark.parametrize("name", STAGES)
def test_the_options_of_a_stage_exist_and_say_what_it_computes(name: str) -> None:
    (watched,) = DVC[name]["params"]
    assert watched == {"presets/${preset}.yaml": list(STAGES[name].options)}
    for dotted in STAGES[name].options:
        model = Preset
        for part in dotted.split("."):
            assert part in model.model_fields, dotted
            model = model.model_fields[part].annotation
        assert not dotted.startswith("compute"), "how to compute is no part of a result"


def test_the_inventory_lists_every_stage() -> None:
    assert DVC["inventory"]["always_changed"]
    files = [f"outputs/${{preset}}/inventory/{name}.json" for name in STAGES]
    assert DVC["inventory"]["outs"] == [{file: {"cache": False}} for file in files]


@pytest.mark.parametrize("name", STAGES)
def test_the_flow_and_its_deployment_exist(name: str) -> None:
    flow = stage_flow(name)
    assert flow.name == name
    path, function = PREFECT[name]["entrypoint"].split(":")
    assert getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), function) is flow
    assert PREFECT[name]["work_pool"]["name"] == STAGES[name].pool
    assert flow.timeout_seconds == 3600 * STAGES[name].hours
    assert flow.description.startswith(STAGES[name].description)


@pytest.mark.parametrize("name", STAGES)
def test_the_function_that_runs_the_stage_exists(name: str) -> None:
    assert callable(STAGES[name].load())


def test_inputs_come_before_the_stage_that_reads_them() -> None:
    order = [*PIPELINE, *BRANCHES]
    assert all(order.index(i) < order.index(name) for name in order for i in STAGES[name].inputs)


def test_nightly_evaluation_is_scheduled() -> None:
    schedule = PREFECT["nightly-evaluation"]["schedules"][0]
    assert (schedule["cron"], schedule["timezone"], schedule["active"]) == ("0 2 * * *", "UTC", True)
    assert PREFECT["nightly-evaluation"]["parameters"] == {"preset": "tiny"}


def test_a_pod_asks_for_what_its_row_says() -> None:
    variables = {name: PREFECT[name]["work_pool"]["job_variables"] for name in ("report", "latents")}
    assert variables["report"] == {"cpu_request": "2", "memory_request": "4Gi", "memory_limit": "16Gi"}
    assert variables["latents"] | {"gpus": 1, "memory_limit": "128Gi"} == variables["latents"]


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(UserError, match="curation"):
        find_stage("curatoin")
