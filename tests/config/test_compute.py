"""What defines a result and how it is computed are two parts of a preset; moved keys are told, one line each."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import yaml
from project_folder import give_presets

from flows.running import runner
from flows.stages import STAGES, find_stage
from svd.config import Preset, TrainingCompute
from svd.config.compute import MOVED, TRAININGS
from svd.config.load import PRESETS, ConfigError, load_preset, parse_preset

TINY = yaml.safe_load((PRESETS / "tiny.yaml").read_text())
load_preset_once = cache(lambda: load_preset("tiny"))


def test_a_training_takes_what_it_does_not_set_from_all_trainings() -> None:
    compute = load_preset("tiny", {"compute.training.devices": 4, "compute.camera_lora.devices": 2}).compute
    assert (compute.of("image-to-video").devices, compute.of("camera-lora").devices) == (4, 2)
    assert compute.of("camera_lora").sample_steps == compute.training.sample_steps == 12
    assert compute.of("camera-lora").nodes == TrainingCompute().nodes


def test_a_dumped_preset_reads_the_same() -> None:
    """Dumps spell out every default; ranks and registered models read them."""
    preset = load_preset("tiny", {"compute.training.devices": 4, "compute.camera_lora.nodes": 2})
    assert Preset.model_validate(preset.model_dump(mode="json")).compute == preset.compute


def test_a_preset_needs_no_compute(tmp_path: Path) -> None:
    values = yaml.safe_load((PRESETS / "tiny.yaml").read_text())
    del values["compute"]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    compute = load_preset(str(tmp_path / "tiny.yaml")).compute
    assert compute.of("image-to-video") == TrainingCompute() and compute.curation.workers == 1


@pytest.mark.parametrize("key", sorted(MOVED))
def test_a_key_at_its_old_place_is_told_in_one_line(key: str) -> None:
    """The line names the file, the old place and the new one, which exists."""
    values, place = deepcopy(TINY), load_preset_once().compute.model_dump(mode="json")
    *parents, name = key.split(".")
    section = values
    for parent in parents:
        section, place = section[parent], place[parent]
    section[name] = place[name]
    with pytest.raises(ConfigError) as error:
        parse_preset(values, "mine.yaml")
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"mine.yaml: '{key}' moved to 'compute.{key}'")
    assert (f"(or 'compute.training.{name}' for all trainings)" in line) == (parents[0] in TRAININGS)


def test_every_moved_key_has_its_own_line() -> None:
    old = {"image_pretraining.devices": 1, "curation.workers": 1, "compute.trainin": {}}
    with pytest.raises(ConfigError) as error:
        load_preset("tiny", old)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and any(line.endswith("'compute.trainin'; did you mean 'training'?") for line in lines)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("compute.training.device", "'compute.training.device'; did you mean 'devices'?"),
        ("compute.image_to_video.check_points", "'compute.image_to_video.check_points'; did you mean 'checkpointing'?"),
        ("compute.evaluation.ucf101.batchsize", "did you mean 'batch_size'?"),
    ],
)
def test_mistakes_in_compute_are_named_once(path: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_preset("tiny", {path: 1})
    (line,) = str(error.value).splitlines()
    assert said in line


@pytest.mark.parametrize("name", ["tiny", "finetune", "paper"])
def test_every_batch_can_be_shared(name: str) -> None:
    """By the ranks and the accumulation steps of the preset; the training would refuse it."""
    preset = load_preset(name)
    for section in TRAININGS:
        compute = preset.compute.of(section)
        assert compute.devices != "auto"
        parts = compute.devices * compute.nodes * compute.gradient_accumulation
        for phase in getattr(preset, section).phases:
            assert phase.batch_size % parts == 0, section


def test_no_stage_depends_on_how_it_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC watches the listed options alone, and work in progress is named by them."""
    monkeypatch.chdir(give_presets(tmp_path))
    changed = {
        "training": {"devices": 3, "nodes": 2, "strategy": "fsdp2", "num_workers": 2, "gradient_accumulation": 2}
        | {"checkpointing": "all", "compile": True, "checkpoint_every": 7, "validate_every": 7, "sample_steps": 7}
        | {"keep_checkpoints": 3, "damaged_share": 0.5, "context_ranks": 2, "stream": True},
        "curation": {"workers": 5},
        "latents": {"workers": 5},
        "autoencoder": {"checkpoint_every": 7},
        "evaluation": {"ucf101": {"batch_size": 5}},
    }
    assert changed["training"].keys() == TrainingCompute.model_fields.keys()
    preset, other = load_preset("tiny"), load_preset("tiny", {"compute": changed})
    assert preset.compute != other.compute
    for name in STAGES:
        assert not any(section.startswith("compute") for section in find_stage(name).options), name
        stage = find_stage(name)
        assert runner.work_digest(stage, preset, {}) == runner.work_digest(stage, other, {}), name
