"""The project in the working folder: its presets, its places, and the preset that a pipeline runs with."""

from __future__ import annotations

from pathlib import Path

import pytest
from project_folder import PRESETS, give_presets

from flows.places import Place, run_key_of
from flows.prefect_flows import nightly
from flows.project import current_preset, pipeline_preset
from flows.stages import STAGES
from svd.config.load import load_preset
from svd.core.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("preset: tiny\n")
    return tmp_path


def test_a_pipeline_takes_its_preset_from_its_parameter_and_leaves_params_alone(folder: Path) -> None:
    give_presets(folder)
    assert pipeline_preset(None).name == current_preset() == "tiny"
    assert pipeline_preset("finetune").name == "finetune"
    assert (folder / "params.yaml").read_text() == "preset: tiny\n"


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_no_shipped_preset_leaves_open_what_dvc_watches(name: str, folder: Path) -> None:
    give_presets(folder)
    assert pipeline_preset(name).name == name


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("\nseed: 0", "", "'seed'"),
        ("    cross_attention_dim: 64\n", "", "'model.unet.cross_attention_dim'"),
    ],
)
def test_a_preset_that_leaves_open_what_dvc_watches_is_refused(old: str, new: str, said: str, folder: Path) -> None:
    (folder / "presets").mkdir()
    text = (PRESETS / "tiny.yaml").read_text()
    assert text.count(old) == 1
    (folder / "presets" / "tiny.yaml").write_text(text.replace(old, new))
    load_preset("tiny")  # a valid preset all the same
    with pytest.raises(UserError) as error:
        pipeline_preset(None)
    assert str(error.value) == f"presets/tiny.yaml leaves {said} to the default, but DVC watches it there; write it out"


def test_presets_are_those_of_the_working_folder(folder: Path) -> None:
    with pytest.raises(UserError, match=f"no presets/ in {folder}; run the command in the project's folder"):
        load_preset("tiny")
    (folder / "presets").mkdir()
    text = (Path(__file__).parents[2] / "presets" / "tiny.yaml").read_text()
    (folder / "presets" / "tiny.yaml").write_text(text.replace("\nseed: 0", "\nseed: 7"))
    assert load_preset("tiny").seed == 7


def test_the_nightly_names_its_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    for parameters, name in (({"preset": "finetune"}, "finetune"), ({"preset": None}, "tiny"), ({}, "tiny")):
        monkeypatch.setattr(nightly.flow_run, "parameters", parameters, raising=False)
        assert nightly._run_name() == f"nightly-evaluation-{name}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_place_knows_its_paths_both_ways(stage: str) -> None:
    place = Place("tiny", stage)
    assert Place.of_output(place.output) == Place.of_output(str(place.output)) == place
    assert Place.of_work(place.work("1a2b")) == place
    assert set(place.inputs) == set(STAGES[stage].inputs)
    assert all(Place.of_output(path).stage == name for name, path in place.inputs.items())
    assert place.inventory == Path(f"outputs/tiny/inventory/{stage}.json")
    assert run_key_of(place.work("1a2b")) == Path(f"work/tiny/{stage}/1a2b.run")
