"""The stage that trains the autoencoder: what it writes, that it learns, resumes exactly and explains mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from curated import write_curation
from model_cards import read_card
from PIL import Image

from svd.catalogue.schema import CLIPS_SCHEMA
from svd.catalogue.tables import read_clips, write_table_rows
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.model.autoencoder import Autoencoder, sample_posterior
from svd.model.formats.folders import load_autoencoder, save_autoencoder
from svd.stage import NoTracker, StageContext
from svd.training.autoencoder import initial_autoencoder, run
from svd.training.autoencoder_phase import trainable
from svd.training.frames import ClipPixels, split_rows

SMALL = {
    "model.autoencoder.block_out_channels": [16, 16],
    "autoencoder.iterations": 6,
    "autoencoder.temporal_iterations": 4,
    "autoencoder.discriminator_start": 2,
    "autoencoder.discriminator_width": 8,
    "autoencoder.height": 32,
    "autoencoder.width": 48,
    "autoencoder.crop": [32, 32],
    "autoencoder.perceptual_frames": 1,
    "autoencoder.batch_size": 4,
    "autoencoder.frames": 2,
    "compute.autoencoder.checkpoint_every": 2,
}


class Killed(Exception):
    """The process dies here."""


class KillingTracker(NoTracker):
    """Dies when a step of a phase is reported."""

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if f"{self.phase}/loss" in metrics:
            raise Killed


@pytest.fixture(scope="module")
def curation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_curation(tmp_path_factory.mktemp("curation"), train=6, test=2)


def context(folder: Path, curation: Path, **changes: Any) -> StageContext:
    preset = load_preset("tiny", SMALL | {key.replace("__", "."): value for key, value in changes.items()})
    return StageContext(preset, {"curation": curation}, folder / "out", folder / "work")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(curation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    run(context(folder, curation))
    return folder / "out"


def test_the_output_is_a_model_with_losses_and_a_picture(finished: Path) -> None:
    autoencoder = load_autoencoder(finished)
    assert autoencoder.config.temporal_decoder
    rows = (finished / "losses.csv").read_text().splitlines()
    assert rows[0].startswith("phase,step,loss,l1,squared,perceptual,kl,generator,adaptive_weight,discriminator")
    assert [row.split(",")[0] for row in rows[1:]] == ["image"] * 6 + ["temporal"] * 4
    picture = np.asarray(Image.open(finished / "reconstructions.png"))
    assert picture.shape == (2 * 2 * 32, 2 * 48, 3)
    adaptive = [float(row.split(",")[8]) for row in rows[7:]]
    assert adaptive[:2] == [0, 0]
    assert all(value > 0 for value in adaptive[2:])
    card = read_card(finished)
    assert card["license"] == "apache-2.0" and "pipeline_tag" not in card


def test_the_measured_scaling_factor_gives_unit_variance(finished: Path, curation: Path) -> None:
    autoencoder = load_autoencoder(finished)
    pixels = ClipPixels(curation, split_rows(curation)[0], 2, 32, 48)
    with torch.no_grad():
        moments = autoencoder.encode(pixels.examples(6)[:, :1])
    draws = sample_posterior(moments, torch.Generator().manual_seed(0)) * autoencoder.config.scaling_factor
    assert abs(draws.std() - 1) < 0.02


def test_a_killed_run_ends_in_the_same_bytes(finished: Path, curation: Path, tmp_path: Path, monkeypatch) -> None:
    """Killed in the image phase, and again in the temporal phase, between two checkpoints."""
    plain = context(tmp_path, curation)
    monkeypatch.setattr("svd.training.autoencoder.LOG_EVERY", 3)
    for phase in ("image", "temporal"):
        with pytest.raises(Killed):
            run(replace(plain, tracker=KillingTracker(phase)))
    run(plain)
    assert contents(tmp_path / "out") == contents(finished)


def test_it_learns(curation: Path, tmp_path: Path) -> None:
    changes = {
        "autoencoder__iterations": 60,
        "autoencoder__temporal_iterations": 0,
        "compute__autoencoder__checkpoint_every": 99,
    }
    metrics = run(context(tmp_path, curation, **changes)).metrics
    assert float(metrics["psnr"]) > float(metrics["psnr_before"]) + 3
    assert float(metrics["l1"]) < 0.6 * float(metrics["l1_before"])


def test_the_temporal_phase_leaves_the_encoder_alone(curation: Path, tmp_path: Path) -> None:
    start = initial_autoencoder(context(tmp_path, curation).preset)
    save_autoencoder(start, tmp_path / "released")
    changes = {"autoencoder__iterations": 0, "model__autoencoder__pretrained": str(tmp_path / "released")}
    run(context(tmp_path, curation, **changes))
    trained, begun = load_autoencoder(tmp_path / "out").state_dict(), start.state_dict()
    for name, value in begun.items():
        if name.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(trained[name], value), name
    moved = [name for name, value in begun.items() if not torch.equal(trained[name], value)]
    assert any("temporal_res_block" in name for name in moved)
    assert any("time_conv_out" in name for name in moved)
    assert any("spatial_res_block" in name for name in moved)


def test_phases_train_what_they_say() -> None:
    autoencoder = initial_autoencoder(load_preset("tiny", SMALL))

    def names(phase: str, encoder: bool) -> set[str]:
        chosen = {id(p) for p in trainable(autoencoder, phase, encoder)}  # type: ignore[arg-type]
        return {name for name, p in autoencoder.named_parameters() if id(p) in chosen}

    every = {name for name, _ in autoencoder.named_parameters()}
    temporal = {n for n in every if "temporal_res_block" in n or "time_" in n}
    decoder = {n for n in every if n.startswith("decoder.")}
    assert names("temporal", True) == decoder
    assert names("image", False) == decoder - temporal
    assert names("image", True) == every - temporal


def test_released_image_weights_get_a_temporal_decoder(tmp_path: Path) -> None:
    preset = load_preset("tiny", SMALL)
    config = initial_autoencoder(preset).config
    image = Autoencoder(type(config)(**(vars(config) | {"temporal_decoder": False, "scaling_factor": 0.3})))
    save_autoencoder(image, tmp_path / "vae")
    loaded = initial_autoencoder(load_preset("tiny", SMALL | {"model.autoencoder.pretrained": str(tmp_path / "vae")}))
    assert loaded.config.temporal_decoder
    assert loaded.config.scaling_factor == 0.3
    assert torch.equal(loaded.encoder.conv_in.weight, image.encoder.conv_in.weight)


def test_mistakes_are_explained_in_one_line(curation: Path, tmp_path: Path) -> None:
    cases = {
        "no such file or folder": {"model__autoencoder__pretrained": "/no/where"},
        "none of 6 kept clips has 9 frames": {"autoencoder__frames": 9, "autoencoder__batch_size": 9},
        "no weights given": {"autoencoder__perceptual": "lpips-vgg"},
    }
    for message, changes in cases.items():
        with pytest.raises(UserError, match=message) as error:
            run(context(tmp_path, curation, **changes))
        assert "\n" not in str(error.value)


def test_an_empty_curation_is_explained(curation: Path, tmp_path: Path) -> None:
    rows = [row | {"keep": False} for row in read_clips(curation).iter_rows(named=True)]
    (tmp_path / "catalogue").mkdir()
    write_table_rows(tmp_path / "catalogue" / "clips.parquet", rows, CLIPS_SCHEMA)
    with pytest.raises(UserError, match="kept no clip to train on"):
        run(context(tmp_path, tmp_path))
