"""The multi-view benchmark end to end on a random model: the plumbing, the truth, the controls, resuming."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from tiny_models import WIDTH

from evaluation.claims import read_claims
from evaluation.multiview import benchmark as views
from evaluation.multiview.curve import read_checkpoint, score_checkpoints, write_curve
from evaluation.multiview.protocol import PROTOCOLS, Truth, save_array, view_protocol
from evaluation.multiview.scores import Measures, Scores, score
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.media.video import read_frames
from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.formats import clip as clips
from svd.model.formats.folders import load_unet, save_autoencoder, save_unet
from svd.model.unet import UNet, UNetConfig
from svd.orbits.render import orbit_azimuths
from svd.orbits.renderer import open_renderer
from svd.stage import Report, StageContext

OVERRIDES: dict[str, Any] = {
    "encoders.toy_width": WIDTH,
    "evaluation.multiview.objects": 3,
    "evaluation.multiview.views": 5,
    "evaluation.multiview.size": 32,
    "evaluation.multiview.sampling.steps": 2,
}


def write_models(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    unet = UNet(
        UNetConfig(
            in_channels=8, block_out_channels=(32, 32), attention_levels=(True, False), layers_per_block=1,
            head_channels=16, cross_attention_dim=WIDTH, id_embedding_dim=8, ids=4,
        )
    )  # fmt: skip
    with torch.no_grad():
        unet.conv_out.weight.normal_(std=0.1)  # a fresh network's output is zero, so it would equal the control
    save_unet(unet, folder / "mv" / "unet")
    config = AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=1.0)
    save_autoencoder(Autoencoder(config), folder / "autoencoder")
    toy = clips.toy_config(WIDTH, WIDTH)
    clips.save_toy(clips.build_clip(toy, "test"), toy, folder / "encoders")
    return {
        "multiview-finetuning": folder / "mv",
        "autoencoder": folder / "autoencoder",
        "encoders": folder / "encoders",
    }


def context(folder: Path, inputs: dict[str, Path], **overrides: Any) -> StageContext:
    named = {f"evaluation.multiview.{name}": value for name, value in overrides.items()}
    folder.mkdir(parents=True, exist_ok=True)
    return StageContext(load_preset("tiny", {**OVERRIDES, **named}), inputs, folder / "out", folder / "work")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path], Report]:
    folder = tmp_path_factory.mktemp("views")
    inputs = write_models(folder / "models")
    return folder, inputs, views.run(context(folder, inputs))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_tables_name_their_origin(finished: tuple[Path, dict[str, Path], Report]) -> None:
    folder, _, report = finished
    table = rows(folder / "out/results.csv")
    assert [row["subject"] for row in table] == list(views.SUBJECTS)
    for row in table:
        assert row["clip_weights"] == "toy-clip" and row["source"] == "measured" and row["objects"] == "3"
        assert row["renderer"] in ("moderngl", "pyvista")
        assert row["protocol"].startswith("svd_gso_v1[views=5,size=32]") and row["dataset"] == "procedural_test_objects"
        assert "lpips" not in row and 0 <= float(row["stlpips_alex"]) < 2
    assert float(table[0]["psnr"]) == pytest.approx(float(report.metrics["psnr"]), abs=1e-5)
    assert json.loads((folder / "out/metrics.json").read_text()) == dict(report.metrics)
    text = (folder / "out/comparison.md").read_text()
    assert "SVD-MV | 16.830" in text and "Fig. 10a" in text
    assert len(rows(folder / "out/by_view.csv")) == len(views.SUBJECTS) * 3 * 5


def test_the_renderer_is_part_of_what_was_measured(finished: tuple[Path, dict[str, Path], Report]) -> None:
    folder, _, report = finished
    about = json.loads((folder / "out/protocol.json").read_text())
    assert about["protocol"]["renderer"] == report.metrics["renderer"]
    config = load_preset("tiny", OVERRIDES).evaluation.multiview
    digests = {name: view_protocol(config, name).digest for name in ("moderngl", "pyvista")}
    assert digests["moderngl"] != digests["pyvista"] and digests[str(report.metrics["renderer"])] == about["digest"]


def test_the_truth_of_other_meshes_is_not_taken_from_disk(tmp_path: Path) -> None:
    """More files in the folder, or others under their names, make another choice of objects."""
    config = load_preset("tiny", {**OVERRIDES, "evaluation.multiview.objects": 2}).evaluation.multiview
    config = config.model_copy(update={"meshes": [str(tmp_path / "meshes")]})
    (tmp_path / "meshes").mkdir()
    with open_renderer(config.renderer) as renderer:
        protocol = view_protocol(config, renderer.name)

        def pictures(*boxes: tuple[str, float]) -> list[np.ndarray]:
            for name, height in boxes:
                path = tmp_path / "meshes" / name / "model.glb"
                path.parent.mkdir(exist_ok=True)
                trimesh.creation.box(extents=(0.5, height, 0.5)).export(path)
            truth = views.render_truth(tmp_path / "truth", config, protocol, 0, renderer)
            assert all(name.endswith("/model.glb") for name in truth.names)
            return [truth.views(number) for number in range(2)]

        first = pictures(("a", 1.0), ("b", 1.0))
        changed = pictures(("a", 0.2), ("b", 0.2))
        again = pictures(("a", 1.0), ("b", 1.0))
    assert all(not np.array_equal(one, other) for one, other in zip(first, changed, strict=True))
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))


def test_curve_over_checkpoints(finished: tuple[Path, dict[str, Path], Report], tmp_path: Path) -> None:
    """Fig. 10b: the benchmark's own model has the benchmark's scores; a worse one stands below it."""
    _, inputs, report = finished
    worse = shutil.copytree(inputs["multiview-finetuning"], tmp_path / "worse")
    unet = load_unet(worse / "unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(20)
    save_unet(unet, worse / "unet")
    texts = [f"SVD-MV:200={inputs['multiview-finetuning'] / 'unet'}", f"SVD-MV:100={worse}", f"Scratch-MV:100={worse}"]
    checkpoints = [read_checkpoint(text) for text in texts]
    preset = load_preset("tiny", OVERRIDES)
    table = score_checkpoints(checkpoints, preset, inputs, tmp_path / "work")
    assert [(row["subject"], row["step"]) for row in table] == [("SVD-MV", 100), ("SVD-MV", 200), ("Scratch-MV", 100)]
    assert table[1]["psnr"] == pytest.approx(report.metrics["psnr"], abs=1e-5)
    assert table[1]["clip_s"] == pytest.approx(report.metrics["clip_s"], abs=1e-5)
    assert table[2]["psnr"] == table[0]["psnr"] != table[1]["psnr"] and table[0]["unet"] != table[1]["unet"]
    write_curve(tmp_path / "curve", table)
    assert [row["step"] for row in rows(tmp_path / "curve" / "curve.csv")] == ["100", "200", "100"]
    assert (tmp_path / "curve" / "curve.png").stat().st_size > 5000
    for text in ("SVD-MV=x", "SVD-MV:now=x", ":1=x", "SVD-MV:1="):
        with pytest.raises(UserError, match="expected MODEL:STEP=FOLDER"):
            read_checkpoint(text)
    with pytest.raises(UserError, match="no U-Net there"):
        score_checkpoints([read_checkpoint(f"a:1={tmp_path}")], preset, inputs, tmp_path / "work")


def test_controls_are_what_they_say(finished: tuple[Path, dict[str, Path], Report]) -> None:
    folder, _, _ = finished
    table = {row["subject"]: row for row in rows(folder / "out/results.csv")}
    by_view = rows(folder / "out/by_view.csv")
    copies = [row for row in by_view if row["subject"] == "copy of the input view"]
    assert all(float(row["psnr"]) == 100 for row in copies if float(row["azimuth"]) == 0)
    assert float(table["mean view"]["psnr"]) > float(table["untrained"]["psnr"])
    assert table["generated"]["psnr"] != table["untrained"]["psnr"]
    assert float(table["mean view"]["psnr"]) > 10


def test_a_good_model_is_shown_to_be_good_and_copying_is_not(finished: tuple[Path, dict[str, Path], Report]) -> None:
    """The random network of this run shows nothing; the truth with some noise does, against the same controls."""
    folder, _, report = finished
    names = ("generated", views.ONE_STEP, *views.MODEL_FREE)
    claims = read_claims(folder / "out")
    assert len(claims) == 8 and not any(claim.shown for claim in claims)
    assert claims[0].value == pytest.approx(report.metrics["psnr"]) and claims[0].n == 3
    table, perceptual = rows(folder / "out/by_view.csv"), "stlpips_alex"

    def scores(subject: str, better: bool) -> Scores:
        found = {}
        for metric, least in (("psnr", 40.0), (perceptual, 0.01)):
            values = [float(r[metric]) for r in table if r["subject"] == subject]
            found[metric] = np.full((9, 5), least) if better else np.tile(np.array(values).reshape(3, 5), (3, 1))
            found[metric][:, 0] += np.arange(9) * 1e-3  # of fewer than 8 objects nothing is shown
        return Scores(subject, found, np.zeros((5, 5)))

    measures = SimpleNamespace(perceptor=SimpleNamespace(name=perceptual))
    protocol = view_protocol(load_preset("tiny", OVERRIDES).evaluation.multiview, "moderngl")
    verdicts = {
        fault: [c.shown for c in views.claims_of([scores(n, n == good) for n in names], protocol, measures)]
        for fault, good in (("none", "generated"), ("input view cut", "nobody"))
    }
    assert verdicts["none"][:2] == [True, True] and not any(verdicts["input view cut"])


def test_pictures_can_be_opened(finished: tuple[Path, dict[str, Path], Report]) -> None:
    folder, _, _ = finished
    samples = folder / "out/samples"
    sheet, _ = read_frames(samples / "contact_sheet.png")
    assert sheet.shape[2] == 64 + 5 * 32 and sheet.shape[1] > 3 * 3 * 32
    turning, _ = read_frames(samples / "turntable.mp4")
    assert len(turning) == 10 and turning.shape[1] == 2 * 128
    assert (samples / "psnr_by_azimuth.png").stat().st_size > 5000 and (samples / "turntable.gif").exists()


def test_equal_bytes_and_resuming(finished: tuple[Path, dict[str, Path], Report], monkeypatch: Any) -> None:
    folder, inputs, _ = finished
    again = folder / "again"
    calls: list[int] = []
    make = views.multiview

    def dies(models: Any, images: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(models, images, *rest, **options)

    monkeypatch.setattr(views, "multiview", dies)
    monkeypatch.setattr(views, "_PIXELS_AT_ONCE", 2 * 5 * 32 * 32)
    with pytest.raises(KeyboardInterrupt):
        views.run(context(again, inputs))
    views.run(context(again, inputs))
    assert calls == [2, 1, 1, 1, 1, 1, 2, 1]  # the first batch was not made again
    for path in sorted((folder / "out").rglob("*.*")):
        assert path.read_bytes() == (again / "out" / path.relative_to(folder / "out")).read_bytes(), path.name


def test_protocols() -> None:
    config = load_preset("tiny").evaluation.multiview
    changed = view_protocol(config, "moderngl")
    assert changed.name == "svd_gso_v1[views=9,size=64]" and changed.elevation == 10
    plain = view_protocol(config.model_copy(update={"views": None, "size": None}), "moderngl")
    assert plain == dataclasses.replace(PROTOCOLS["svd_gso_v1"], renderer="moderngl")
    assert plain.views == 21 and plain.size == 576
    assert np.allclose(plain.azimuths, orbit_azimuths(21)) and plain.digest != changed.digest
    other = PROTOCOLS["syncdreamer_gso_v1"]
    assert (other.views, other.size, other.elevation, other.radius) == (16, 256, 30.0, 1.5)
    assert other.fov == pytest.approx(2 * np.degrees(np.arctan(16 / 35)), abs=0.01)
    assert other.light.irradiance.max() == pytest.approx(0.5 * plain.light.irradiance.max())


def test_perfect_views_are_perfect_and_a_reversed_orbit_is_not(tmp_path: Path) -> None:
    inputs = write_models(tmp_path / "models")
    config = context(tmp_path, inputs).preset
    with open_renderer("auto") as renderer:
        protocol = view_protocol(config.evaluation.multiview, renderer.name)
        truth = views.render_truth(tmp_path / "truth", config.evaluation.multiview, protocol, 0, renderer)
    models = views.load_models(
        inputs["multiview-finetuning"] / "unet", inputs["autoencoder"], inputs["encoders"], config.encoders
    )
    measures = Measures(views.Perceptor("stlpips-alex"), models.encoders)
    perfect = score("perfect", truth.views, truth, measures)
    assert perfect.novel("psnr") == 100 and perfect.novel("clip_s") == pytest.approx(1, abs=1e-5)
    assert perfect.novel("ssim") == pytest.approx(1, abs=1e-5) and perfect.novel("silhouette_iou") == 1
    backwards = score("backwards", lambda i: truth.views(i)[[3, 2, 1, 0, 4]], truth, measures)
    found = views.best_alignment(backwards.pairs)
    assert not found.ok and found.reversed and found.shift == 0
    assert "WRONG ORDER" in views._summary([backwards], found, measures.perceptor)


def test_mean_view_is_the_mean_of_novel_views(tmp_path: Path) -> None:
    first, second = np.zeros((3, 2, 2, 3), np.uint8), np.full((3, 2, 2, 3), 100, np.uint8)
    first[-1] = 255  # the conditioning view does not count
    for number, array in enumerate((first, second)):
        save_array(tmp_path / f"{number}.npy", array)
    truth = Truth(["a", "b"], [tmp_path / "0.npy", tmp_path / "1.npy"], "test")
    assert (views.mean_view(truth) == 50).all()


def test_mistakes(finished: tuple[Path, dict[str, Path], Report], tmp_path: Path) -> None:
    _, inputs, _ = finished
    with pytest.raises(UserError, match="does not exist"):
        views.run(context(tmp_path / "a", inputs, meshes=["/nowhere"]))
    with pytest.raises(UserError, match="published weights"):
        views.run(context(tmp_path / "b", inputs, perceptual="lpips-vgg"))
    with pytest.raises(UserError, match="gone"):
        views.run(context(tmp_path / "c", {**inputs, "multiview-finetuning": tmp_path / "gone"}))
