"""Presets: all valid, the paper's numbers in place, mistakes named by file, path and nearest name."""

from pathlib import Path

import pytest

from svd.config import load as presets
from svd.config.load import ConfigError, load_preset


@pytest.mark.parametrize("name", ["tiny", "finetune", "paper"])
def test_shipped_presets_are_valid(name: str) -> None:
    assert load_preset(name).name == name


def test_the_paper_preset_holds_the_papers_numbers() -> None:
    paper = load_preset("paper")
    stage_two = [(p.iterations, p.batch_size, p.height, p.width, p.p_mean) for p in paper.video_pretraining.phases]
    assert stage_two == [(150_000, 1536, 256, 384, -1.2), (100_000, 768, 320, 576, 0.0)]
    assert [(p.frames, p.p_mean, p.p_std) for p in paper.image_to_video.phases] == [
        (14, 0.7, 1.6),
        (14, 1.0, 1.6),
        (25, 1.0, 1.6),
    ]
    (interpolation,) = paper.frame_interpolation.phases
    assert (interpolation.batch_size, interpolation.frames, interpolation.p_std) == (256, 5, 1.2)
    assert paper.evaluation.ucf101.samples == 13_320
    assert paper.curation.captions.probabilities == {"coca": 0.5, "video": 0.25, "llm": 0.25}
    assert paper.camera_lora.rank == 16
    assert paper.threshold_calibration.removed == [0.0, 0.125, 0.25, 0.5]


# Spec of the paper's appendix D, one row a phase: frames, height, width, batch, iterations, learning rate, noise.
PHASES = {
    "video_pretraining": [
        (14, 256, 384, 1536, 150_000, 1e-4, -1.2, 1.0),
        (14, 320, 576, 768, 100_000, 1e-4, 0.0, 1.0),
    ],
    "high_quality_finetuning": [(14, 576, 1024, 768, 50_000, 3e-5, 0.5, 1.4)],
    "image_to_video": [
        (14, 320, 576, 768, 50_000, 3e-5, 0.7, 1.6),
        (14, 576, 1024, 768, 50_000, 3e-5, 1.0, 1.6),
        (25, 576, 1024, 768, 50_000, 3e-5, 1.0, 1.6),
    ],
    "frame_interpolation": [(5, 576, 1024, 256, 10_000, 1e-4, 1.0, 1.2)],
    "multiview_finetuning": [(21, 576, 576, 16, 12_000, 1e-5, 1.0, 1.6)],
}


@pytest.mark.parametrize("stage", PHASES)
def test_phases_are_those_of_appendix_d(stage: str) -> None:
    section = getattr(load_preset("paper"), stage)
    found = [
        (p.frames, p.height, p.width, p.batch_size, p.iterations, p.learning_rate, p.p_mean, p.p_std)
        for p in section.phases
    ]
    assert found == PHASES[stage]
    assert section.optimizer == "adamw" and section.objective == "edm" and section.ema_decay == 0.9999


def test_the_image_stage_of_the_paper() -> None:
    first, second = load_preset("paper").image_pretraining.phases
    assert (first.iterations, first.height, first.width, first.trainable) == (1000, 512, 512, "time-embedding")
    assert (second.iterations, second.height, second.width, second.trainable) == (30_000, 256, 384, "all")
    assert {(p.frames, p.p_mean, p.p_std) for p in (first, second)} == {(1, -1.2, 1.0)}


def test_the_papers_conditioning_and_adapters() -> None:
    paper = load_preset("paper")
    assert paper.video_pretraining.text_dropout == 0.15
    for section in (paper.image_to_video, paper.frame_interpolation):
        assert (section.conditioning_p_mean, section.conditioning_p_std) == (-3.0, 0.5)
    lora = paper.camera_lora
    assert (lora.rank, lora.phases[0].iterations) == (16, 5000)
    assert lora.motions == ["horizontal", "zoom", "static"]
    orbits = paper.orbits
    assert (orbits.objects, orbits.views, orbits.size) == (150_000, 21, 576)
    assert (orbits.min_elevation, orbits.max_elevation) == (-5, 30)


def test_the_papers_calibration_and_what_it_chose() -> None:
    calibration, curation = load_preset("paper").threshold_calibration, load_preset("paper").curation
    (phase,) = calibration.phases
    assert (phase.frames, phase.height, phase.width) == (8, 256, 256)
    assert (phase.batch_size, phase.iterations, phase.learning_rate) == (256, 40_000, 1e-4)
    assert (calibration.objective, calibration.optimizer, calibration.text_dropout) == ("discrete-v", "adamw", 0.1)
    assert calibration.offset_noise > 0 and calibration.clips == 9_800_000
    assert (calibration.prompts, calibration.votes, len(calibration.axes)) == (64, 3, 5)
    sampling = calibration.sampling
    assert (sampling.steps, sampling.guidance, sampling.solver) == (50, 12, "ddim")
    filters = curation.filters
    assert filters.min_motion and filters.min_motion.quantile == 0.25
    assert filters.min_aesthetics and filters.min_aesthetics.quantile == 0.25
    assert filters.min_similarity and filters.min_similarity.quantile == 0.5
    assert filters.max_text_area and filters.max_text_area.absolute == 0.07


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("curation.cuts.pases", 1, r"'curation.cuts.pases'; did you mean 'passes'"),
        ("modle", {}, r"did you mean 'model'"),
        ("curation.motion.fps", -1, r"'curation.motion.fps'.*greater than 0.*-1"),
        ("seed", "x", r"'seed'.*integer"),
        ("curation.filters.min_motion", {"absolute": 1, "quantile": 0.5}, "exactly one"),
        ("curation.filters.min_motion", {"absolute": 1, "at_most": 2}, "bound a quantile"),
        ("curation.filters.min_motion", {"quantile": 0.5, "at_least": 2, "at_most": 1}, "not be above"),
        ("latents.min_fps", 100, "min_fps"),
    ],
)
def test_mistakes_are_named(path: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_preset("tiny", {path: value})
    assert "tiny.yaml" in str(error.value)


def lines_about(text: str, folder: Path) -> list[str]:
    """The lines about a preset file with this text, each without the path of the file."""
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_preset(str(folder / "mine.yaml"))
    return [line.removeprefix(f"{folder / 'mine.yaml'}: ") for line in str(error.value).splitlines()]


ALL_BUT_THE_FIRST = (
    "video_pretraining, high_quality_finetuning, image_to_video, camera_lora, frame_interpolation, "
    "threshold_calibration, multiview_finetuning"
)
FAST = "max_fps: 6"  # of tiny's section latents


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("orbits: {", "orbit: {", ["'orbits' is missing", "unknown key 'orbit'; did you mean 'orbits'?"]),
        ("  autoencoder:\n    block", "  decoder:\n    block", ["'model.autoencoder' is missing", "unknown key"]),
        (FAST, "max_fps: 1", ["'latents': 'min_fps' must not exceed 'max_fps'"]),
        (
            "{frames: 6, height: 64",
            "{frames: 2, height: 64",
            ["'video_pretraining.phases.0' needs 6 frames of 64x64, "],
        ),
        (FAST, "max_fps: fast", ["'latents.max_fps': Input should be a valid number"]),
        (
            "{sidecar: 0.95",
            "{sidecart: 0.75",
            ["unknown key 'curation.captions.probabilities.sidecart': Input should be"],
        ),
        (
            "warmup: 10",
            "warmup: -1",
            ["'image_pretraining.warmup': Input should be greater than or equal to 0 (got -1)"],
        ),
        ("warmup: 10", "devices: 2", ["'image_pretraining.devices' moved to 'compute.image_pretraining.devices' (or "]),
    ],
)
def test_a_mistake_is_one_line_without_the_whole_preset(old: str, new: str, said: list[str], tmp_path: Path) -> None:
    lines = lines_about((presets.PRESETS / "tiny.yaml").read_text().replace(old, new, 1), tmp_path)
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True)), lines
    assert all("Value error" not in line and "(got {" not in line and len(line) < 400 for line in lines)
    repeated = old.startswith("warmup")
    assert lines[0].endswith(f"; the same in {ALL_BUT_THE_FIRST}") == repeated


def test_a_mistake_that_differs_between_sections_is_told_for_each(tmp_path: Path) -> None:
    text = (presets.PRESETS / "tiny.yaml").read_text()
    text = text.replace("  rank: 4\n", "  rank: 4\n  warmup: -2\n").replace("  clips: 256\n", "  warmup: -3\n")
    lines = lines_about(text, tmp_path)
    assert [line.split(":")[0] for line in lines] == ["'camera_lora.warmup'", "'threshold_calibration.warmup'"]


def test_an_override_changes_one_place_of_an_aliased_mapping(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    shared = "subset: &few {min_motion: 0.1, min_similarity: 0.1, max_text_area: 0.1}"
    text = (presets.PRESETS / "tiny.yaml").read_text().replace(shared.replace("&few ", ""), shared)
    path.write_text(text.replace("  rank: 4\n", "  rank: 4\n  subset: *few\n"))
    changed = load_preset(str(path), {"camera_lora.subset.min_motion": 0.5, "camera_lora.subset.min_similarity": 0.2})
    assert changed.camera_lora.subset.model_dump() == {"min_motion": 0.5, "min_similarity": 0.2, "max_text_area": 0.1}
    assert changed.high_quality_finetuning.subset.min_motion == 0.1


@pytest.mark.parametrize("stage", ["video_pretraining", "image_to_video", "camera_lora", "multiview_finetuning"])
def test_images_join_text_to_video_alone(stage: str) -> None:
    phases = [{**phase.model_dump(), "image_share": 0.2} for phase in getattr(load_preset("tiny"), stage).phases]
    if stage == "video_pretraining":
        assert load_preset("tiny", {f"{stage}.phases": phases}).video_pretraining.phases[0].image_share == 0.2
        return
    with pytest.raises(ConfigError, match=rf"'{stage}.phases.0.image_share': only video_pretraining"):
        load_preset("tiny", {f"{stage}.phases": phases})


def test_a_missing_preset_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"finetune, paper, tiny"):
        load_preset("nothing")


def test_a_copy_in_presets_needs_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (presets.PRESETS / "tiny.yaml").read_text()
    monkeypatch.setattr(presets, "PRESETS", tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    for given in ("mine", str(tmp_path / "mine.yaml")):
        with pytest.raises(ConfigError, match=r"mine.yaml: 'name' is 'tiny', .*write `name: mine`$"):
            load_preset(given)
    (tmp_path / "mine.yaml").write_text(text.replace("name: tiny", "name: mine"))
    assert load_preset("mine").name == "mine"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "other.yaml").write_text(text)
    assert load_preset(str(tmp_path / "elsewhere" / "other.yaml")).name == "tiny"
