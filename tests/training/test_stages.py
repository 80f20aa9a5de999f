"""Every training stage runs, learns, leaves what it promises, and names what it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from lightning.pytorch import Trainer
from model_cards import read_card
from safetensors.torch import load_file, save_file
from toy_training import FRAMES, PHASE, SIZE, WIDTH, toy_context, toy_preset

from svd.config import Preset, Subset
from svd.core.errors import UserError
from svd.latents import stage as latents
from svd.latents.cache import LatentCache
from svd.latents.index import Index
from svd.model.formats.folders import load_unet
from svd.model.lora import load_lora
from svd.stage import StageContext
from svd.training import runner, stages
from svd.training.module import Diffusion

SHORT = [{**PHASE, "iterations": 2}]


class Pictures:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.images: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
        self.metrics: dict[str, list[int]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        for key, value in metrics.items():
            assert np.isfinite(value), key
            self.metrics.setdefault(key, []).append(step)

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        assert image.dtype == np.uint8
        self.images.setdefault(key, []).append((step, image.shape))

    def log_file(self, path: Path, folder: str = "") -> None:
        raise AssertionError("no stage logs files here")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which image and video pretraining have run."""
    folder = tmp_path_factory.mktemp("chain")
    image = {**PHASE, "frames": 1}
    first = {**image, "iterations": 1, "trainable": "time-embedding"}
    phases = [first, {**image, "iterations": 40, "batch_size": 8, "learning_rate": 5e-3}]
    preset = toy_preset(phases=phases, ema_decay=0.7, validate_every=20)
    stages.run_image_pretraining(toy_context(folder, "image-pretraining", preset))
    outputs = folder / "outputs"
    context = toy_context(folder, "video-pretraining", short(), image_pretraining=outputs / "image-pretraining")
    stages.run_video_pretraining(context)
    return folder


def short() -> Preset:
    return toy_preset(phases=SHORT, validate_every=1)


def test_image_pretraining_learns_and_leaves_its_curve(chain: Path) -> None:
    output = chain / "outputs" / "image-pretraining"
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["validation_loss_after"] < 0.9 * metrics["validation_loss_before"]
    curve = pl.read_csv(output / "losses.csv")
    assert curve.columns == ["step", "train_loss", "val_loss"]
    assert curve["step"].to_list()[0] == 0 and curve["step"].to_list()[-1] == metrics["steps"] == 41
    assert curve["step"].is_unique().all()
    assert curve["val_loss"].drop_nulls()[-1] == pytest.approx(metrics["validation_loss_after"], abs=1e-5)
    assert (output / "samples" / "generated-0.png").stat().st_size > 0
    unet = load_unet(output / "unet")
    assert not unet.config.temporal and unet.config.ids == 0 and unet.config.checkpointing == "none"
    assert read_card(output)["pipeline_tag"] == "text-to-image"


def test_what_is_published_is_the_average_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules, finish = [], runner._finish_phase

    def keep(trainer: Trainer, module: Diffusion, *others: Any) -> None:
        modules.append(module)
        finish(trainer, module, *others)

    monkeypatch.setattr(runner, "_finish_phase", keep)
    context = toy_context(tmp_path, "image-pretraining", toy_preset(phases=[PHASE], ema_decay=0.9))
    stages.run_image_pretraining(context)
    published = load_file(context.output / "unet" / "diffusion_pytorch_model.safetensors")
    averages = {name.replace("/", "."): value for name, value in modules[0].ema.named_parameters()}
    assert averages.keys() == published.keys()
    assert all(published[name].equal(value) for name, value in averages.items())
    assert not published["conv_in.weight"].equal(modules[0].unet.conv_in.weight)


def test_video_pretraining_starts_from_the_image_model(chain: Path) -> None:
    image = load_file(chain / "outputs/image-pretraining/unet/diffusion_pytorch_model.safetensors")
    video = load_file(chain / "outputs/video-pretraining/unet/diffusion_pytorch_model.safetensors")
    near, far = image["mid_block.resnets.0.conv1.weight"], video["mid_block.resnets.0.spatial_res_block.conv1.weight"]
    assert 0 < (near - far).abs().max() < 0.02
    assert load_unet(chain / "outputs/video-pretraining/unet").config.ids == 2
    films = sorted(path.name for path in (chain / "outputs/video-pretraining/samples").iterdir())
    assert read_card(chain / "outputs/video-pretraining")["pipeline_tag"] == "text-to-video"
    assert films == [*(f"{kind}-{k}.mp4" for kind in ("generated", "real") for k in range(3)), "sheet.png"]


def test_progress_is_reported(chain: Path) -> None:
    tracker = Pictures()
    base = toy_context(chain, "high-quality-finetuning", short(), video_pretraining=chain / "outputs/video-pretraining")
    stages.run_high_quality_finetuning(StageContext(base.preset, base.inputs, base.output, base.work, tracker))
    assert tracker.metrics["val_loss"] == [0, 1, 2]
    assert (
        tracker.metrics["train_loss"] == tracker.metrics["gradient_norm"] == tracker.metrics["learning_rate"] == [1, 2]
    )
    assert any(key.startswith("val_loss/sigma_") for key in tracker.metrics)
    sheets = tracker.images["samples/high-quality-finetuning"]
    assert sheets == [(1, (6 * SIZE, FRAMES * SIZE, 3)), (2, (6 * SIZE, FRAMES * SIZE, 3))]


def losses_of(output: Path) -> tuple[dict[str, Any], pl.DataFrame]:
    return json.loads((output / "metrics.json").read_text()), pl.read_csv(output / "validation.csv")


def test_every_loss_is_compared_on_the_same_samples(chain: Path) -> None:
    metrics, table = losses_of(chain / "outputs/image-pretraining")
    assert table.columns == ["sigma", "before", "after", "linear", "swapped"], "fresh weights started from nothing"
    assert len(table) == metrics["validation_samples"] == 8 and table["sigma"].n_unique() == 8
    for name in ("before", "after", "linear", "swapped"):
        assert table[name].mean() == pytest.approx(metrics[f"validation_loss_{name}"], abs=1e-5)
    clips = [
        row["clip_id"] for row in LatentCache(chain / "latents").rows(short().image_pretraining.phases[-1], "test")
    ]
    gain = (table["linear"] - table["after"]).to_numpy()
    left = gain - gain.mean()  # one sample a level: no strata to speak of
    sums = [sum(left[i] for i in range(8) if clips[i % len(clips)] == clip) for clip in dict.fromkeys(clips)]
    count = metrics["validation_clips"]
    assert count == len(sums) < 8, "few clips are drawn several times"
    error = (sum(one**2 for one in sums) * count / (count - 1)) ** 0.5 / len(gain)
    assert metrics["validation_margin_linear"] == pytest.approx(gain.mean() / error, abs=0.01)


def test_the_start_is_the_previous_network_as_it_was_trained(chain: Path) -> None:
    """Finetuning: the first weights themselves. Image to video: the network that reads the caption, not the image."""
    video = chain / "outputs/video-pretraining"
    stages.run_high_quality_finetuning(toy_context(chain, "start-hq", short(), video_pretraining=video))
    stages.run_image_to_video(toy_context(chain, "start-i2v", short(), video_pretraining=video))
    before, table = losses_of(video)[1], losses_of(chain / "outputs/start-hq")[1]
    assert np.allclose(table["start"], table["before"]) and np.allclose(table["start"], before["after"], atol=1e-5)
    other = losses_of(chain / "outputs/start-i2v")[1]
    assert np.allclose(other["start"], table["start"], atol=1e-5), "the same samples, noise and captions"
    assert not np.allclose(other["start"], other["before"], atol=1e-5)
    assert not np.allclose(other["linear"], table["linear"], atol=1e-3), "this filter is given the first frame"


def test_image_to_video_and_its_loras(chain: Path) -> None:
    context = toy_context(chain, "image-to-video", short(), video_pretraining=chain / "outputs/video-pretraining")
    stages.run_image_to_video(context)
    folder = context.output / "unet"
    unet = load_unet(folder)
    assert (unet.config.in_channels, unet.config.ids) == (8, 3)
    assert read_card(context.output)["pipeline_tag"] == "image-to-video"
    result = stages.run_camera_lora(toy_context(chain, "camera-lora", short(), image_to_video=context.output))
    assert "image-to-video" in read_card(chain / "outputs/camera-lora")["tags"]
    before = load_unet(folder)
    x = torch.randn(1, FRAMES, 8, 8, 8)
    signals = torch.zeros(1), torch.randn(1, 1, WIDTH), torch.rand(1, 3)
    with torch.no_grad():
        plain = before(x, *signals)
    assert {key.rpartition("_")[2] for key in result.metrics} == {"horizontal", "zoom", "static"}
    for motion in ("horizontal", "zoom", "static"):
        adapted = load_unet(folder)
        load_lora(adapted, chain / "outputs" / "camera-lora" / motion, motion)
        with torch.no_grad():
            assert not torch.equal(adapted(x, *signals), plain), "an adapter that changes nothing has not learned"
    counts = {motion: result.metrics[f"samples_train_{motion}"] for motion in ("horizontal", "zoom", "static")}
    assert counts == {"horizontal": 4, "zoom": 2, "static": 3}


def test_a_motion_without_clips_is_named(chain: Path) -> None:
    preset = toy_preset(phases=SHORT, subset={"min_motion": 0.95})
    lora = preset.camera_lora.model_copy(update={"motions": ["static"]})
    preset = preset.model_copy(update={"camera_lora": lora})
    context = toy_context(chain, "lora-without", preset, image_to_video=chain / "outputs/image-to-video")
    with pytest.raises(UserError, match=r"'static' \(static, object-motion\)"):
        stages.run_camera_lora(context)


def test_frame_interpolation_learns_its_mask(chain: Path) -> None:
    previous = chain / "outputs/video-pretraining"
    context = toy_context(chain, "frame-interpolation", short(), high_quality_finetuning=previous)
    stages.run_frame_interpolation(context)
    unet = load_unet(context.output / "unet")
    assert unet.config.in_channels == 9
    assert "interpolation" in " ".join(read_card(context.output)["tags"])
    assert unet.mask_latent.shape == (4, 8, 8) and unet.mask_latent.abs().max() > 0


@pytest.mark.parametrize("initialisation", ["image-to-video", "image-model", "scratch"])
def test_multiview_from_each_initialisation(
    chain: Path, initialisation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    orbits = write_orbits(tmp_path / "orbits")
    fakes = SimpleNamespace(
        text=lambda texts: torch.zeros(len(texts), 5, WIDTH), image=lambda frames: torch.ones(len(frames), WIDTH)
    )
    monkeypatch.setattr(latents, "load_encoders", lambda *_: fakes)
    encoders = tmp_path / "encoders"
    encoders.mkdir()
    save_file({"x": torch.zeros(1)}, encoders / "clip.safetensors")
    training = {**PHASE, "iterations": 2, "frames": 5}
    preset = toy_preset(phases=SHORT)
    multiview = preset.multiview_finetuning.model_copy(
        update={
            "phases": [preset.video_pretraining.phases[0].model_validate(training)],
            "initialisation": initialisation,
            "validation_samples": 4,
        }
    )
    context = toy_context(
        chain,
        f"multiview-{initialisation}",
        preset.model_copy(update={"multiview_finetuning": multiview}),
        orbits=orbits,
        encoders=encoders,
        image_to_video=chain / "outputs/video-pretraining",
        image_pretraining=chain / "outputs/image-pretraining",
    )
    report = stages.run_multiview_finetuning(context)
    unet = load_unet(context.output / "unet")
    assert (unet.config.in_channels, unet.config.ids) == (8, 4)
    assert "multi-view" in read_card(context.output)["tags"]
    started = {"image-to-video": "video-pretraining", "image-model": "image-pretraining"}.get(initialisation)
    text = (context.output / "README.md").read_text()
    assert ("first weights" in text) == (started is not None) and (started is None or f"`{started}`" in text)
    assert report.metrics["samples_train"] == 8 and report.metrics["samples_test"] == 2
    image = load_unet(chain / "outputs/image-pretraining/unet").state_dict()
    name = "down_blocks.0.resnets.0.{}conv1.weight"
    ours = unet.state_dict()[name.format("spatial_res_block.")]
    theirs = next(t for k, t in image.items() if k in (name.format(""), name.format("spatial_res_block.")))
    assert ((ours - theirs).abs().max() < 0.02) == (initialisation != "scratch")


def write_orbits(folder: Path) -> Path:
    folder.mkdir()
    frames = torch.randint(0, 256, (10, 5, SIZE, SIZE, 3), dtype=torch.uint8)
    save_file({"frames": frames, "elevation": torch.linspace(-5, 30, 10)}, folder / "orbits-00000.safetensors")
    (folder / "index.json").write_text("[]")
    return folder


def test_a_subset_drops_the_named_share() -> None:
    scores = {"motion_score": range(100), "similarity": range(100), "text_area": range(100)}
    table = pl.DataFrame({"sample_id": [f"{n:03}" for n in range(100)], **scores}).to_arrow()
    rows = Index(table).rows
    kept = stages.select_subset(rows, Subset(min_motion=0.25, max_text_area=0.1))
    assert kept.column("motion_score").min() == 24 and kept.column("text_area").max() == 90
    assert len(stages.select_subset(rows, Subset())) == 100


def test_a_missing_predecessor_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage 'image-pretraining', or weights in 'model\.pretrained'"):
        stages.run_video_pretraining(toy_context(tmp_path, "video-pretraining", short()))


def test_a_batch_that_accumulation_cant_share_is_refused(tmp_path: Path) -> None:
    preset = toy_preset(phases=SHORT, gradient_accumulation=3)
    with pytest.raises(UserError, match="'batch_size'"):
        stages.run_image_pretraining(toy_context(tmp_path, "image-pretraining", preset))
