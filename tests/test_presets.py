"""Presets: all valid, the paper's numbers in place, mistakes named by file, path and nearest name."""

from pathlib import Path

import pytest

from svd import presets
from svd.presets import ConfigError, load_preset


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


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("curation.cuts.pases", 1, r"'curation.cuts.pases'; did you mean 'passes'"),
        ("modle", {}, r"did you mean 'model'"),
        ("curation.motion.fps", -1, r"'curation.motion.fps'.*greater than 0.*-1"),
        ("seed", "x", r"'seed'.*integer"),
        ("curation.filters.min_motion", {"absolute": 1, "quantile": 0.5}, "exactly one"),
        ("latents.min_fps", 100, "min_fps"),
    ],
)
def test_mistakes_are_named(path: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_preset("tiny", {path: value})
    assert "tiny.yaml" in str(error.value)


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
