"""Model cards: equal for equal results, true about parents and their licences, and without secrets and paths."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from model_cards import read_card
from toy_training import PHASE, toy_context, toy_preset

from svd.config import Preset
from svd.model.formats.folders import checkpoint_hash
from svd.model.safetensors import file_hash
from svd.stage import StageContext
from svd.training import card_contents, stages
from svd.training.model_card import Card, Parent, front_matter, inherited_licence, licence_of, render, with_provenance

SHORT = [{**PHASE, "iterations": 2}]
OPTIONS = {"seed": 0, "model": {"pretrained": None}}


def changed(preset: Preset, **values: Any) -> Preset:
    """A preset with other values at dotted paths, `__` for the dots."""
    tree = preset.model_dump(mode="json")
    for name, value in values.items():
        *parents, last = name.split("__")
        place = tree
        for parent in parents:
            place = place[parent]
        place[last] = value
    return Preset.model_validate(tree)


def trained(folder: Path, preset: Preset | None = None, **inputs: Path) -> StageContext:
    """Image pretraining of two steps, as the platform runs it."""
    preset = preset or toy_preset(phases=SHORT)
    context = toy_context(folder, "image-pretraining", preset, **inputs)
    context = replace(context, description="Stage I (§3.2, D.2).", options=OPTIONS)
    stages.run_image_pretraining(context)
    return context


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    return trained(tmp_path_factory.mktemp("first"))


def table(folder: Path, title: str) -> dict[str, list[str]]:
    """The rows of a section's table, by their first cell."""
    text = (folder / "README.md").read_text()
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, title
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section[1].splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows[2:]}


def test_a_card_says_what_was_made_of_what(first: StageContext) -> None:
    output, preset = first.output, first.preset
    assert read_card(output)["library_name"] == "diffusers"
    assert "Stage I (§3.2, D.2)." in (output / "README.md").read_text()
    metrics = json.loads((output / "metrics.json").read_text())
    assert table(output, "Metrics") == {name: [str(value)] for name, value in metrics.items()}
    data = table(output, "Data")
    index = first.inputs["latents"] / "index.parquet"
    assert data["SHA-256 of the index of samples"] == [f"`{file_hash(index)}`"] and data["read from"] == ["`latents`"]
    phase = preset.image_pretraining.phases[0]
    assert data["samples drawn"] == [str(phase.iterations * phase.batch_size)]
    parents = table(output, "Parents")
    assert parents == {"autoencoder": ["`autoencoder`", f"`{checkpoint_hash(first.inputs['autoencoder'])}`", "unknown"]}
    assert table(output, "Preset")["seed"] == [str(preset.seed)]


def test_equal_results_have_equal_cards(first: StageContext, tmp_path: Path) -> None:
    """Another folder, another way to compute it and what it doesn't depend on make no other bytes."""
    other = changed(toy_preset(phases=SHORT, sample_steps=1), evaluation__recognition__prompts=4)
    again = trained(tmp_path, other)
    assert (again.output / "README.md").read_bytes() == (first.output / "README.md").read_bytes()


def test_another_option_makes_another_card(first: StageContext) -> None:
    card = Card("image-pretraining", (), {}, (), ())
    texts = {render(card, replace(first, options={"seed": seed}), {}) for seed in (0, 1)}
    assert len(texts) == 2


def test_the_next_stage_names_its_parents_by_their_weights(first: StageContext, tmp_path: Path) -> None:
    context = toy_context(tmp_path, "video-pretraining", toy_preset(phases=SHORT), image_pretraining=first.output)
    stages.run_video_pretraining(context)
    assert table(context.output, "Parents")["first weights"] == [
        "`image-pretraining`",
        f"`{checkpoint_hash(first.output / 'unet')}`",
        licence_of(first.output / "README.md"),
    ]


def test_released_parents_bring_their_licence_and_no_secret(
    first: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a private folder, encoders behind a login, and a repository on the hub."""
    weights = "https://ann:SECRET@host/clip.safetensors?v=2&X-Amz-Signature=SECRET"
    preset = changed(
        toy_preset(phases=SHORT),
        model__pretrained=str(first.output),
        encoders__kind="open_clip",
        encoders__weights=weights,
        licences={first.output.name: "the-terms-of-ann", weights: "mit"},
    )
    made = trained(tmp_path, preset, encoders=first.inputs["autoencoder"])
    text, values = (made.output / "README.md").read_text(), read_card(made.output)
    parents = table(made.output, "Parents")
    assert parents["first weights"] == [
        first.output.name,
        f"`{checkpoint_hash(first.output / 'unet')}`",
        "the-terms-of-ann",
    ]
    assert parents["encoders"] == ["ViT-H-14 https://host/clip.safetensors?v=2", "`unknown`", "mit"]
    assert (values["license"], values["license_name"]) == ("other", "mit, the-terms-of-ann, unknown")
    assert "base_model" not in values, "no repository of a hub"
    assert "SECRET" not in text and "ann:" not in text and str(first.output.parent) not in text

    monkeypatch.setattr(card_contents, "resolve_weights", lambda *_: first.output)
    hub = card_contents.released("first weights", "ann/weights", {"ann/weights": "openrail++"}, "unet")
    card = Card("x", (), {}, (hub,), ())
    head = yaml.safe_load(render(card, made, {}).split("---\n")[1])
    assert (head["license"], head["base_model"]) == ("openrail++", ["ann/weights"])


def test_secrets_of_options_are_in_no_digest(first: StageContext) -> None:
    """A renewed signature is the same source."""
    card = Card("x", ("a",), {"read from": "s3://user:SECRET@host/x"}, (), ())
    texts = [
        render(card, replace(first, options={"weights": f"https://host/a?v=1&sig=SECRET{k}"}), {"m": 1}) for k in (1, 2)
    ]
    assert texts[0] == texts[1] and "SECRET" not in texts[0]
    assert "SECRET" not in with_provenance(texts[0], {"store": "s3://user:SECRET@host/store"})


def parent(licence: str) -> Parent:
    return Parent("first weights", "x", "0", licence)


def test_only_own_parents_leave_the_own_licence() -> None:
    assert inherited_licence([]) == inherited_licence([parent("apache-2.0")]) == "apache-2.0"
    assert inherited_licence([parent("apache-2.0"), parent("unknown")]) == "unknown"
    several = [parent("openrail++"), parent("mit"), parent("apache-2.0"), parent("mit, openrail++")]
    assert inherited_licence(several) == "mit, openrail++"


@pytest.mark.parametrize("text", ["", "# no front matter", "---\n: [\n---\n", "---\n- a\n---\n"])
def test_a_card_that_cant_be_read_names_no_licence(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path / "README.md") == licence_of(tmp_path / "none") == "unknown"


def test_cells_and_front_matter_survive_what_people_write(first: StageContext, tmp_path: Path) -> None:
    strange = "a | b: 'c'\n---\n# \"d\""
    card = Card("x", (strange,), {strange: strange}, (parent(strange),), ())
    (tmp_path / "README.md").write_text(render(card, first, {"loss": 0.5}))
    assert read_card(tmp_path)["license_name"] == strange
    assert front_matter(tmp_path / "README.md")["tags"][0] == strange
    assert "## Metrics" in (tmp_path / "README.md").read_text()


def test_a_network_that_a_linear_filter_matches_says_so(first: StageContext) -> None:
    card = Card("x", (), {}, (), ())
    losses = {"validation_loss_linear": 0.5}
    for margin, clips, said in ((2.9, 8, True), (3.1, 8, False), (3.1, 7, True)):
        text = render(card, first, losses | {"validation_margin_linear": margin, "validation_clips": clips})
        assert ("not surely better than a linear filter" in text) == said
    assert "not surely better" in render(card, first, losses) and "not surely" not in render(card, first, {"psnr": 30})
