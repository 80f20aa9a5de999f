"""One table of stages: dvc.yaml, prefect.yaml, the flows and the code agree with it."""

import importlib

import pytest
import yaml
from closure import PACKAGES, ROOT, data_files, reachable

from flows.prefect_flows.dispatch import stage_flow
from flows.stages import BRANCHES, EXTERNAL, PIPELINE, STAGES, find_stage
from svd.core.errors import UserError

DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
DVC |= yaml.safe_load((ROOT / "branches" / "dvc.yaml").read_text())["stages"]
# Code that can't change a result: options (DVC watches their values), transport, where processes run, previews.
WITHOUT_EFFECT = frozenset(
    {
        "svd/config/preset.py",
        "svd/config/data.py",
        "svd/core/retries.py",
        "svd/storage/s3.py",
        "svd/stage.py",
        "svd/storage/files.py",
        "svd/training/launch.py",
        "svd/training/ranks.py",
        "svd/training/samples.py",
        "svd/storage/http.py",
    }
)
PREFECT = {d["name"]: d for d in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}


@pytest.mark.parametrize("name", STAGES)
def test_dvc_lists_the_stage_with_its_inputs_and_output(name: str) -> None:
    entry = DVC[name]
    data = {dep for dep in entry["deps"] if dep.startswith("outputs/")}
    made = {f"outputs/${{preset}}/{stage}" for stage in STAGES[name].inputs}
    made |= {f"outputs/${{preset}}/inventory/{name}.json"} if name in EXTERNAL else set()
    assert data == made
    outs = [next(iter(out)) if isinstance(out, dict) else out for out in entry["outs"]]
    assert outs == [f"outputs/${{preset}}/{name}"]
    assert entry["cmd"] == f"svd stage {name} --preset ${{preset}}"
    missing = [dep for dep in entry["deps"] if not dep.startswith("outputs/") and not (ROOT / dep).exists()]
    assert not missing


@pytest.mark.parametrize("name", STAGES)
def test_dvc_depends_on_exactly_the_code_that_the_stage_can_reach(name: str) -> None:
    needed = reachable(STAGES[name].module, STAGES[name].function, skip=WITHOUT_EFFECT)
    needed |= data_files(needed)
    listed = [dep for dep in DVC[name]["deps"] if dep.split("/")[0] in PACKAGES]
    missing = {file for file in needed if not any(file == dep or file.startswith(f"{dep}/") for dep in listed)}
    assert not missing, f"add to the deps of {name}: {sorted(missing)}"
    unneeded = {dep for dep in listed if dep.endswith(".py")} - needed
    assert not unneeded, f"a change of these would run {name} again for nothing: {sorted(unneeded)}"
    for folder in (ROOT / dep for dep in listed if (ROOT / dep / "__init__.py").exists()):
        modules = {p.relative_to(ROOT).as_posix() for p in folder.rglob("*.py") if p.name != "__init__.py"}
        assert len(modules & needed) > 0.75 * len(modules), f"{name}: list the files of {folder.name} one by one"


def test_reach_follows_names_and_not_whole_files() -> None:
    image = reachable("svd.training.stages", "run_image_pretraining")
    assert {
        "svd/training/muon.py",
        "svd/training/runner.py",
        "svd/model/formats/folders.py",
        "svd/training/ema.py",
    } <= image
    assert not {"svd/latents/orbits.py", "svd/training/lora.py", "svd/model/formats/convert.py"} & image
    assert "svd/latents/orbits.py" in reachable("svd.training.stages", "run_multiview_finetuning")
    assert "svd/media/video.py" in image - reachable(
        "svd.training.stages", "run_image_pretraining", skip=WITHOUT_EFFECT
    )


def test_the_inventory_lists_for_every_stage_that_reads_it() -> None:
    assert DVC["inventory"]["always_changed"]
    assert [next(iter(out)) for out in DVC["inventory"]["outs"]] == [
        f"outputs/${{preset}}/inventory/{name}.json" for name in EXTERNAL
    ]
    files = {f"outputs/${{preset}}/inventory/{name}.json" for name in EXTERNAL}
    assert {dep for entry in DVC.values() for dep in entry.get("deps", []) if "/inventory/" in dep} == files


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
