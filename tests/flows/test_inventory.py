"""Files outside the project: adding, changing or removing one runs the stages that read it, and only those."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from project_folder import give_presets

from flows.recording import dvc as versioning
from flows.recording import inventory
from flows.recording.inventory import take
from flows.stages import STAGES
from svd import storage
from svd.config import Preset
from svd.config.load import load_preset

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
# A stage that costs nothing in place of the one that reads the videos.
READER = {
    "cmd": "mkdir -p outputs/${preset}/sources && cp outputs/${preset}/inventory/*s.json outputs/${preset}/sources",
    "deps": ["outputs/${preset}/inventory/sources.json"],
    "outs": ["outputs/${preset}/sources"],
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project with the real inventory stage, a preset `mine`, and a folder of videos outside it."""
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(b"a")
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(give_presets(folder))
    subprocess.run([BIN / "dvc", "init", "-q", "--no-scm"], check=True)
    real = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["inventory"]
    real["cmd"] = f"{BIN}/svd inventory --preset mine.yaml"
    Path("dvc.yaml").write_text(
        yaml.safe_dump({"vars": ["params.yaml"], "stages": {"inventory": real, "sources": READER}})
    )
    Path("params.yaml").write_text("preset: mine\n")
    Path("mine.yaml").write_text(yaml.safe_dump(mine(videos).model_dump(mode="json")))
    return folder


def mine(videos: Path, **overrides: object) -> Preset:
    return load_preset("tiny", {"name": "mine", "sources.paths": [str(videos)], **overrides})


def repro() -> str:
    result = subprocess.run([BIN / "dvc", "repro"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_new_videos_run_the_sources_again(project: Path) -> None:
    preset, videos = load_preset("mine.yaml"), project.parent / "videos"
    assert "Running stage 'sources'" in repro()
    lock = (project / "dvc.lock").read_text()
    assert "Stage 'sources' didn't change" in repro()
    inventory.take_and_record(preset)
    assert (project / "dvc.lock").read_text() == lock, "the flows record what `dvc repro` does"
    assert not versioning.changed("sources", "mine")
    (videos / "b.mp4").write_bytes(b"b")
    inventory.take_and_record(preset)
    assert versioning.changed("sources", "mine")
    assert "Running stage 'sources'" in repro()
    assert "b.mp4" in (project / "outputs/mine/sources/sources.json").read_text()


@pytest.mark.parametrize("large", [False, True], ids=["hashed", "by time"])
def test_content_counts_and_not_only_names(project: Path, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "HASHED_BYTES", 0 if large else 100)
    file = project.parent / "videos" / "a.mp4"
    preset = mine(file.parent)
    first = take(preset)
    assert take(preset) == first
    file.write_bytes(b"b")
    os.utime(file, ns=(1, 1))
    assert take(preset)["sources"] != first["sources"]
    file.write_bytes(b"a")
    assert (take(preset)["sources"] == first["sources"]) is not large, "a copy elsewhere has another time"


def test_every_option_reaches_its_stage_and_no_other(project: Path) -> None:
    empty = take(mine(project.parent / "videos"))
    options = {
        "curation.nsfw_weights": {"curation"},
        "encoders.aesthetics_weights": {"encoders", "curation", "threshold-calibration"},
        "model.autoencoder.pretrained": {"autoencoder", "image-pretraining", "threshold-calibration"},
        "model.pretrained": {"image-pretraining", "threshold-calibration"},
        "orbits.meshes": {"orbits"},
        "orbits.environments": {"orbits"},
        "evaluation.ucf101.dataset": {"ucf101-evaluation"},
        "evaluation.ucf101.weights": {"ucf101-evaluation"},
        "evaluation.multiview.meshes": {"multiview-benchmark"},
        "evaluation.multiview.lpips_weights": {"multiview-benchmark"},
    }
    (project / "given").mkdir()
    (project / "given" / "file").touch()
    for option, stages in options.items():
        value = ["given"] if option.endswith(("meshes", "environments")) else "given"
        found = take(mine(project.parent / "videos", **{option: value}))
        changed = {name for name in found if found[name].get("given")}
        assert changed == stages, option
        assert not empty[next(iter(stages))].get("given")


def test_globs_hidden_files_and_texts_that_are_no_paths(project: Path) -> None:
    videos = project.parent / "videos"
    (videos / ".DS_Store").touch()
    (videos / "notes.txt").touch()
    found = take(mine(videos, **{"sources.paths": [f"{videos}/*.mp4", "https://example.org/x.mp4", "x" * 5000]}))
    assert [row[0] for row in found["sources"][f"{videos}/*.mp4"]] == [f"{videos}/a.mp4"]
    assert not found["sources"]["https://example.org/x.mp4"] and not found["sources"]["x" * 5000]
    assert [row[0] for row in take(mine(videos))["sources"][str(videos)]] == [f"{videos}/a.mp4", f"{videos}/notes.txt"]


def test_objects_are_listed_with_their_version(project: Path, bucket: str) -> None:
    preset = mine(project, **{"sources.paths": [f"{bucket}/raw"], "evaluation.ucf101.weights": f"{bucket}/raw/a"})
    storage.write_bytes(f"{bucket}/raw/a", b"1")
    first = take(preset)
    assert [row[:2] for row in first["sources"][f"{bucket}/raw"]] == [["a", 1]]
    assert take(preset) == first
    storage.write_bytes(f"{bucket}/raw/a", b"2")
    second = take(preset)
    assert second["sources"] != first["sources"] and second["ucf101-evaluation"] != first["ucf101-evaluation"]


def test_code_packages_and_defaults_of_every_stage_are_listed(project: Path) -> None:
    take(load_preset("tiny"))
    for name in STAGES:
        content = json.loads((project / f"outputs/tiny/inventory/{name}.json").read_text())
        assert set(content) == {"code", "packages", "defaults", "files"} and content["code"] and content["packages"]
    defaults = json.loads((project / "outputs/tiny/inventory/video-pretraining.json").read_text())["defaults"]
    assert "video_pretraining.weight_decay" in defaults, "an option that the preset leaves to the code"
    assert all(name.split(".")[0] in ("seed", "model", "video_pretraining", "curation") for name in defaults)
    take(load_preset("tiny", {"video_pretraining.weight_decay": 0.5}))
    after = json.loads((project / "outputs/tiny/inventory/video-pretraining.json").read_text())["defaults"]
    assert defaults.keys() - after.keys() == {"video_pretraining.weight_decay"}
