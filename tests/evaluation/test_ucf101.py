"""The UCF-101 stage: official lists, class histogram, controls, cached batches, exact repetition, honest names."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import CLASSES, make_context, write_dataset

from evaluation.frechet import folders, ucf101
from evaluation.frechet.gate import compare_scores
from evaluation.frechet.protocol import I3D, I3D_TORCHSCRIPT_SHA256, EvalProtocol, named_protocols
from evaluation.frechet.ucf101_data import group_numbers, prompt_list, read_dataset, read_real
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.core.files import write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ucf101")
    ucf101.run(make_context(path, seeds=2))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_output_holds_scores_controls_and_the_floor(folder: Path) -> None:
    result = json.loads((folder / "output" / "result.json").read_text())
    assert result["metric"] == "frechet_transnetv2" and result["dataset"] == "ucf101_fixture"
    subjects = [(score["subject"], score["seed"]) for score in result["scores"]]
    per_seed = [(name, seed) for seed in (0, 1) for name in ("generated", "untrained", "noise")]
    assert sorted(subjects, key=str) == sorted([*per_seed, ("mean-frame", None), ("real-split", None)], key=str)
    for score in result["scores"]:
        distance = score["distance"]
        assert distance["frechet"]["value"] > 0 and distance["standard_error"] > 0
        assert distance["generated"] == (6 if score["subject"] == "real-split" else 10)
    assert any("full rank" in text for text in result["warnings"])


def test_metrics_are_flat_and_named_after_fixture_and_network(folder: Path) -> None:
    metrics = json.loads((folder / "output" / "metrics.json").read_text())
    assert {"ucf101_fixture_frechet_transnetv2", "ucf101_fixture_frechet_transnetv2_se"} <= set(metrics)
    assert not [name for name in metrics if "fvd" in name]
    assert metrics["generated_clips"] == 10 and metrics["real_clips"] == 12 and metrics["seeds"] == 2
    assert all(isinstance(value, int | float) for value in metrics.values())


def test_rows_name_weights_protocol_and_source(folder: Path) -> None:
    with (folder / "output" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    measured = [row for row in rows if row["source"] == "measured"]
    paper = [row for row in rows if row["source"].startswith("paper: arXiv 2311.15127")]
    assert len(measured) == 8 and len(paper) == 7 and len(rows) == 15
    digest = json.loads((folder / "output" / "result.json").read_text())["protocol"]["digest"]
    assert all(row["protocol"] == digest and "TransNetV2" in row["weights"] for row in measured)
    assert {row["value"] for row in paper if row["subject"] == "Stable Video Diffusion"} == {"242.02"}
    table = (folder / "output" / "table.md").read_text()
    assert table.index("Measured here") < table.index("Published numbers") < table.index("242")


def test_samples_are_shown_beside_real_clips_of_their_class(folder: Path) -> None:
    listed = json.loads((folder / "output" / "samples" / "samples.json").read_text())
    assert len(listed) == 2
    for entry in listed:
        assert entry["class"] in CLASSES and entry["prompt"] == f"a {entry['class'].lower()}"
        assert entry["class"] in entry["generated"] and entry["class"] in entry["real"]
        assert (folder / "output" / "samples" / entry["generated"]).is_file()
    assert (folder / "output" / "samples" / "grid.png").is_file()


def test_repetition_gives_equal_bytes_and_batches_are_not_made_twice(folder: Path, monkeypatch) -> None:
    """A second run in the same work folder, with one batch lost, samples that batch alone; the bytes are the same."""
    first = tree(folder / "output")
    context = make_context(folder, seeds=2)
    lost = next(context.work.rglob("generated-1/batch-000006.safetensors"))
    lost.unlink()
    calls = []
    original = ucf101.text_to_video
    monkeypatch.setattr(ucf101, "text_to_video", lambda *a, **k: calls.append(len(a[1])) or original(*a, **k))
    ucf101.run(context)
    assert calls == [4]
    assert tree(folder / "output") == first


def test_a_killed_evaluation_goes_on_with_batches_of_another_size(folder: Path, monkeypatch) -> None:
    """What is on disk is kept, whatever its size; the rest comes in batches of the new size."""
    context = make_context(folder, "resized", batch_size=6, controls=[])
    ucf101.run(context)
    first = tree(folder / "resized")
    for lost in context.work.rglob("generated-0/batch-000006.safetensors"):
        lost.unlink()
    calls = []
    original = ucf101.text_to_video
    monkeypatch.setattr(ucf101, "text_to_video", lambda *a, **k: calls.append(len(a[1])) or original(*a, **k))
    ucf101.run(make_context(folder, "resized", batch_size=3, controls=[]))
    assert calls == [3, 1]
    after = tree(folder / "resized")
    assert after.keys() == first.keys() and after["prompts.csv"] == first["prompts.csv"]


def test_a_torn_batch_file_is_made_again(folder: Path) -> None:
    first = tree(folder / "output")
    context = make_context(folder, seeds=2)
    torn = next(context.work.rglob("generated-0/batch-000000.safetensors"))
    torn.write_bytes(torn.read_bytes()[:100])
    ucf101.run(context)
    assert tree(folder / "output") == first


def test_one_seed_in_other_batches_gives_the_same_score_and_cannot_be_compared_with_two(folder: Path) -> None:
    ucf101.run(make_context(folder, "single", batch_size=5, controls=[]))
    both = [json.loads((folder / name / "result.json").read_text()) for name in ("output", "single")]
    first, other = (result["scores"][0]["distance"]["frechet"]["value"] for result in both)
    assert other == pytest.approx(first, rel=1e-3)
    with pytest.raises(UserError, match="other seeds or another number"):
        compare_scores(folder / "output", folder / "single")
    kernel, frechet = compare_scores(folder / "output", folder / "output")
    assert kernel.value == frechet.value == kernel.standard_error == 0


def test_prompt_list_has_the_class_histogram() -> None:
    histogram = {"TableTennisShot": 140, "PlayingPiano": 105, "Other": 13075}
    full = prompt_list(histogram, 13320)
    assert [item.number for item in full] == list(range(13320))
    counts = {label: sum(item.label == label for item in full) for label in histogram}
    assert counts == histogram
    assert {item.prompt for item in full} == set(histogram)
    assert len(prompt_list(histogram, 100)) == 100
    many = {f"{letter}{number}": 1 for letter in "ABCD" for number in range(25)}
    some = [item.label for item in prompt_list(many, 40)]
    assert len(set(some)) == 40 and all(5 < sum(s.startswith(letter) for s in some) < 16 for letter in "ABCD")
    assert len(prompt_list({"A": 1, "B": 2}, 10)) == 10


def test_official_lists_and_counts_are_checked(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data", per_class=2)
    assert read_dataset(path, official=False).histogram == dict.fromkeys(CLASSES, 2)
    with pytest.raises(UserError, match="8 clips, UCF-101 has 13320"):
        read_dataset(path)
    next(path.rglob("*.avi")).unlink()
    with pytest.raises(UserError, match="1 clips of the official lists are missing"):
        read_dataset(path, official=False)
    with pytest.raises(UserError, match="no such folder"):
        read_dataset(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no clips found"):
        read_dataset(tmp_path / "empty")
    (path / "ucfTrainTestlist" / "trainlist01.txt").unlink()
    with pytest.raises(UserError, match="trainlist01"):
        read_dataset(path, official=False)


def test_class_counts_of_the_real_data_set() -> None:
    from evaluation.frechet.ucf101_data import Dataset, _check_official

    labels = ["TableTennisShot"] * 140 + ["PlayingPiano"] * 105 + ["X"] * (13320 - 245)
    _check_official(Dataset(Path("u"), tuple((label, Path(label)) for label in labels)))
    with pytest.raises(UserError, match="104 clips of PlayingPiano"):
        wrong = ["X" if i == 140 else label for i, label in enumerate(labels)]
        _check_official(Dataset(Path("u"), tuple((label, Path(label)) for label in wrong)))


class Published:
    """Stands for the loaded I3D of the paper."""

    net, sha256 = I3D, I3D_TORCHSCRIPT_SHA256


def test_the_stage_and_the_folders_mean_the_same_protocol() -> None:
    """paper.yaml is the paper's protocol, by name and digest; finetune.yaml says what it changes."""
    paper = named_protocols()["svd_ucf101_paper"]
    found = {
        name: ucf101.ucf101_protocol(load_preset(name).evaluation.ucf101, "ucf101", 13_320, Published())
        for name in ("paper", "finetune")
    }
    assert found["paper"] == paper == folders.protocols(["svd_ucf101_paper"])[0]
    assert found["finetune"].name == "svd_ucf101_paper[generated=2048]"
    assert found["finetune"].digest() != paper.digest()


def test_the_stage_and_the_folders_read_the_same_real_frames(tmp_path: Path, monkeypatch) -> None:
    """Below `UCF-101/` or not, a clip has one name and so one start."""
    nested = write_dataset(tmp_path / "data" / "UCF-101").parent
    protocol = named_protocols()["svd_ucf101_paper"].changed(frames=4)
    dataset = read_dataset(nested, official=False)
    label, path = dataset.clips[0]
    names = []
    original = EvalProtocol.real_frames
    monkeypatch.setattr(EvalProtocol, "real_frames", lambda p, name, *a: names.append(name) or original(p, name, *a))
    seen = read_real(dataset, 0, protocol)
    for folder in (nested, nested / "UCF-101"):
        other = folders._images(path, folders.clip_name(path, folder), protocol.changed(real_steps=()), real=True)
        assert torch.equal(other[0], seen.float())
    assert names == [f"{label}/{path.name}"] * 3


def test_evaluations_of_other_real_clips_or_sampling_are_not_compared(folder: Path, tmp_path: Path) -> None:
    result = json.loads((folder / "output" / "result.json").read_text())
    assert result["sampling"]["guidance"] == 2.0 and result["sampling"]["height"] == 16
    assert result["protocol"]["name"].startswith("svd_ucf101_paper[dataset=ucf101_fixture,net=transnetv2:")
    for number, (what, value, message) in enumerate(
        (
            ("sampling", {**result["sampling"], "guidance": 7.0}, "sampled differently"),
            ("real_clips", "0" * 16, "other real clips"),
        )
    ):
        (tmp_path / str(number)).mkdir()
        write_json(tmp_path / str(number) / "result.json", {**result, what: value})
        with pytest.raises(UserError, match=message):
            compare_scores(tmp_path / str(number), folder / "output")


def test_clips_cut_from_one_video_are_one_group() -> None:
    names = ["A/v_A_g01_c01", "A/v_A_g01_c02", "A/v_A_g02_c01", "B/v_B_g01_c01", "A/v_A_g01_c03", "other", "other 2"]
    assert group_numbers(names) == [0, 0, 1, 2, 0, 3, 4]


def test_missing_inputs_are_one_clear_line(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    (tmp_path / "hq" / "unet").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="run the stage that makes the unet first"):
        ucf101.run(context)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """kill -9 as soon as the first generated batch is on disk; the second run samples only the rest."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from tiny_models import make_context;"
        "from evaluation.frechet import ucf101; ucf101.run(make_context(Path(sys.argv[2]), sys.argv[3], seeds=2))"
    )
    for name in ("sources", "hq", "autoencoder", "encoders"):
        shutil.copytree(folder / name, tmp_path / name)
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path), "output"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not list((tmp_path / "work").rglob("generated-0/*.safetensors")):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert not (tmp_path / "output").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert kept and {path: path.stat().st_mtime_ns for path in kept} == kept
    assert tree(tmp_path / "output") == tree(folder / "output")
