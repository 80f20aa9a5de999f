"""Running a stage: work in progress is found again after a kill, and no kill leaves a stage without output."""

from __future__ import annotations

from pathlib import Path

import pytest
from project_folder import give_presets
from small_project import draw, make_project, use

from flows.running import runner
from flows.stages import find_stage
from svd import stage as stages
from svd.config import Preset
from svd.config.load import load_preset
from svd.core.files import recover
from svd.stage import Profile, Report, StageContext, publish

TRAINING = find_stage("video-pretraining")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(give_presets(tmp_path))
    return tmp_path


def start(**overrides: object) -> Path:
    """Open the work of a training under the tiny preset with some options changed, and leave a checkpoint there."""
    work = runner.open_work(TRAINING, load_preset("tiny", dict(overrides)), {})
    runner.run_key(work)
    (work / "step=1.ckpt").touch()
    return work


def test_work_outlives_a_change_that_does_not_concern_the_stage() -> None:
    work = start()
    assert start(**{"evaluation.ucf101.samples": 3, "image_pretraining.warmup": 1}) == work
    assert start(**{"video_pretraining.warmup": 1}) != work
    assert start(**{"seed": 7}) != work


def test_options_that_the_file_leaves_out_do_not_count() -> None:
    """So a version of the code that has one more of them goes on with the work of the version before."""
    preset = load_preset("tiny")
    assert "weight_decay" not in preset.video_pretraining.model_fields_set
    spelt_out = Preset.model_validate(preset.model_dump())
    assert spelt_out == preset
    assert runner.work_digest(TRAINING, spelt_out, {}) != runner.work_digest(TRAINING, preset, {})


def test_changing_an_option_back_finds_the_work_again(caplog: pytest.LogCaptureFixture) -> None:
    first = start()
    second = start(**{"seed": 1})
    assert "holds unfinished work for other options" in caplog.text
    assert (first / "step=1.ckpt").exists()
    third = start(**{"seed": 2})
    assert not first.exists() and (second / "step=1.ckpt").exists()
    assert str(first.relative_to(first.parents[2])) in caplog.text.replace("is removed", "")
    runner.close_work(third)
    assert sorted(p.name for p in second.parent.iterdir()) == [second.name, f"{second.name}.run"]


def make(name: str) -> Path:
    folder = Path("work") / name
    folder.mkdir(parents=True)
    (folder / "a").write_text(name)
    return folder


@pytest.mark.parametrize("kill_at", range(6))
def test_a_kill_at_any_rename_leaves_the_old_or_the_new_output(kill_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Path("outputs/tiny/report")
    publish(make("old"), output, Report({}, ""))
    steps = 0

    def counted(original):  # type: ignore[no-untyped-def]
        def step(*arguments: object, **options: object) -> object:
            nonlocal steps
            steps += 1
            if steps == kill_at + 1:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return step

    finished = make("new")
    with monkeypatch.context() as killing:
        killing.setattr(Path, "rename", counted(Path.rename))
        killing.setattr(stages.shutil, "rmtree", counted(stages.shutil.rmtree))
        try:
            publish(finished, output, Report({}, ""))
        except KeyboardInterrupt:
            assert kill_at < steps
    recover(output)
    assert (output / "a").read_text() in ("old", "new")
    assert (output / "metrics.json").exists()
    assert {p.name for p in output.parent.iterdir()} == {"report", ".report.lock"}


def test_half_of_an_old_output_is_never_brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Path("outputs/tiny/report")
    publish(make("old"), output, Report({}, ""))

    def half(path: Path, **_: object) -> None:
        if path.exists():
            (path / "a").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as killing:
        killing.setattr(stages.shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            publish(make("new"), output, Report({}, ""))
    stages.shutil.rmtree(output)  # as DVC does before it runs the stage again
    recover(output)
    assert not output.exists()


def test_a_stage_brings_its_inputs_and_output_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = load_preset("tiny")
    for name in ("sources", "encoders", "curation"):
        make(name).rename(Path(".") / name)
        Path("outputs/tiny").mkdir(parents=True, exist_ok=True)
        (Path(".") / name).rename(Path("outputs/tiny") / f".{name}.old")

    def far_enough(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(runner, "stage_inputs", far_enough)
    with pytest.raises(InterruptedError):
        runner.run_preset_stage("curation", preset)
    assert [p.name for p in sorted(Path("outputs/tiny").glob("[a-z]*"))] == ["curation", "encoders", "sources"]


@pytest.mark.parametrize(
    ("stage", "streamed"), [("video-pretraining", True), ("camera-lora", False), ("multiview-finetuning", False)]
)
def test_trainings_that_read_latents_may_stream_them(
    stage: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = load_preset("tiny", {"compute.training.stream": True, "compute.camera_lora.stream": False})

    def bring(*arguments: object) -> None:
        assert arguments[-1] is streamed
        raise InterruptedError

    monkeypatch.setattr(runner, "bring_inputs", bring)
    with pytest.raises(InterruptedError):
        runner.run_preset_stage(stage, preset)


@pytest.mark.parametrize("trains", [True, False])
def test_a_stage_is_told_what_to_profile_and_missing_traces_are_told(
    trains: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, wishes = Path(".local/profiles/tiny/orbits"), []

    def work(context: StageContext) -> Report:
        wishes.append(context.profile)
        if trains:
            (folder / "trace.json.gz").write_bytes(b"new")
        return draw(context)

    (tmp_path / "project").mkdir()
    make_project(tmp_path / "project", monkeypatch)
    folder.mkdir(parents=True)
    (folder / "trace.json.gz").write_bytes(b"of an earlier run")
    use(monkeypatch, work)
    runner.run_preset_stage("orbits", load_preset("tiny"), profile=3)
    assert wishes == [Profile(3, folder)]
    assert ("no trace was written" in caplog.text) == (not trains)
