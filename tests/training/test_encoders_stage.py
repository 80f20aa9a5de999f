"""The stage that trains the toy CLIP."""

import hashlib
import json

import numpy as np
import open_clip
import pytest
import torch
from model_cards import read_card

from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.model.encoders import TextEncoder, from_uint8
from svd.model.formats.clip import build_clip, toy_config
from svd.model.formats.encoders import load_encoders
from svd.model.safetensors import of_module, write_tensors
from svd.stage import NoTracker, StageContext
from svd.synthetic.scenes import World
from svd.training import encoders


class Killed(BaseException):
    """Stands for a killed process: nothing may catch it."""


class Killer(NoTracker):
    def __init__(self, step: int) -> None:
        self.step, self.steps = step, []

    def log_metrics(self, metrics, step):
        self.steps.append(step)
        if step == self.step:
            raise Killed


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(encoders, "_TRAIN_CLIPS", 40)
    monkeypatch.setattr(encoders, "_TEST_CLIPS", 20)
    monkeypatch.setattr(encoders, "_BATCH", 8)
    monkeypatch.setattr(encoders, "_CHECKPOINT_EVERY", 4)


def context(folder, tracker=None, **options):
    values = {"encoders.toy_iterations": 10, "encoders.toy_width": 32, "model.unet.cross_attention_dim": 32}
    preset = load_preset("tiny", values | options)
    (folder / "work").mkdir(parents=True, exist_ok=True)
    return StageContext(preset, {}, folder / "out", folder / "work", tracker or NoTracker())


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_output_loads_and_is_the_same_after_a_kill(tmp_path, small):
    report = encoders.run(context(tmp_path / "a"))
    killer = Killer(6)
    with pytest.raises(Killed):
        encoders.run(context(tmp_path / "b", killer))
    assert killer.steps == list(range(7))
    again = Killer(-1)
    encoders.run(context(tmp_path / "b", again))
    assert again.steps == list(range(4, 10))  # continued from the checkpoint after step 4
    for name in ("model.safetensors", "open_clip_config.json", "reference.json", "metrics.json", "README.md"):
        assert digest(tmp_path / "a/out" / name) == digest(tmp_path / "b/out" / name)
    assert json.loads((tmp_path / "a/out/metrics.json").read_text()) == dict(report.metrics)
    loaded = load_encoders(tmp_path / "a/out", context(tmp_path).preset.encoders)
    assert loaded.label == "toy-clip"
    card = read_card(tmp_path / "a/out")
    assert (card["library_name"], card["license"]) == ("open_clip", "apache-2.0")
    assert loaded.text(["a red ball"]).shape == (1, 16, 32)  # `encoders.toy_tokens`
    assert loaded.image(torch.zeros(2, 3, 48, 64)).shape == (2, 32)


def test_the_context_of_captions_stays_as_drawn(tmp_path, small):
    """Learned from single frames, it would say nothing of motion."""
    preset = context(tmp_path).preset
    drawn = encoders._fresh(toy_config(32, 32, preset.encoders.toy_tokens), preset.seed).eval()
    encoders.run(context(tmp_path))
    learned = load_encoders(tmp_path / "out", preset.encoders)
    captions = ["a red ball moves left", "a red ball moves right"]
    torch.testing.assert_close(learned.text(captions), TextEncoder(drawn)(captions).detach())
    assert not torch.allclose(learned.text.features(captions), TextEncoder(drawn).features(captions), atol=0.01)


def test_learns_to_match_unseen_clips_and_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "_TRAIN_CLIPS", 512)
    monkeypatch.setattr(encoders, "_TEST_CLIPS", 60)
    report = encoders.run(context(tmp_path, **{"encoders.toy_iterations": 90})).metrics
    assert 0.35 < report["caption_auc_before"] < 0.65
    assert report["caption_auc"] > 0.8
    assert report["retrieval_top5"] > 2.5 * 5 / 60
    assert report["retrieval_top1_chance"] == pytest.approx(1 / 60)


def test_retrieval_counts_what_it_says():
    torch.manual_seed(0)
    model = build_clip(toy_config(16, 16), "test")
    pairs = encoders.render_pairs(3, "test", 12, frames=1)
    measured = encoders.retrieval(model, pairs)
    images = model.encode_image(encoders.ImageEncoder(model.visual).preprocess(from_uint8(pairs.frames[:, 0])), True)
    texts = model.encode_text(open_clip.get_tokenizer("ViT-H-14")(pairs.captions), True)
    order = (images @ texts.T).argsort(1, descending=True)
    rank = (order == torch.arange(12)[:, None]).nonzero()[:, 1]
    assert measured["retrieval_top1"] == pytest.approx((rank < 1).float().mean().item())
    assert measured["retrieval_top5"] == pytest.approx((rank < 5).float().mean().item())
    assert measured["caption_auc"] == pytest.approx(1 - rank.double().mean().item() / 11)


def test_loss_is_open_clips():
    images, texts, scale = torch.randn(6, 8), torch.randn(6, 8), torch.tensor(2.5)
    loss, _ = encoders.contrastive(images, texts, scale)
    normal = torch.nn.functional.normalize
    reference = open_clip.loss.ClipLoss()(normal(images, dim=-1), normal(texts, dim=-1), scale.exp())
    torch.testing.assert_close(loss, reference)
    perfect, accuracy = encoders.contrastive(torch.eye(6), torch.eye(6), torch.tensor(20.0))
    assert perfect < 1e-3
    assert accuracy == 1


def test_worlds_of_training_and_judging_share_no_caption():
    train, test = (encoders.render_pairs(1, split, 60, frames=1) for split in ("train", "test"))
    assert len(set(train.captions)) == 60
    assert not set(train.captions) & set(test.captions)
    assert train.frames.shape == (60, 1, 64, 96, 3)
    assert train.frames.dtype == np.uint8


def test_worlds_of_two_styles_take_turns():
    pairs = encoders.render_pairs(3, "train", 12, frames=1, styles=["plain", "textured"])
    for place, style in enumerate(("plain", "textured")):
        known = {World(3, "train", style).scene(index).caption for index in range(10)}
        assert set(pairs.captions[place::2]) <= known
    # The plain world has 432 captions, so they come again.
    assert len(set(encoders.render_pairs(3, "train", 500, 1, ["plain"]).captions)) <= 432


def test_released_weights_leave_a_reference(tmp_path, monkeypatch):
    small = toy_config(16, 32)
    write_tensors(tmp_path / "weights.safetensors", of_module(build_clip(small, "test")))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: small)
    options = {
        "encoders": {"kind": "open_clip", "model": "ViT-H-14", "weights": str(tmp_path / "weights.safetensors")},
        "model.unet.cross_attention_dim": 32,
    }
    preset = load_preset("tiny", options)
    (tmp_path / "work").mkdir()
    encoders.run(StageContext(preset, {}, tmp_path / "out", tmp_path / "work"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"reference.json", "metrics.json"}
    assert load_encoders(tmp_path / "out", preset.encoders).image(torch.zeros(1, 3, 64, 64)).shape == (1, 32)


def test_missing_released_weights_are_named(tmp_path):
    values = {"encoders": {"kind": "open_clip", "weights": "/nowhere/clip.safetensors"}}
    preset = load_preset("tiny", values)
    (tmp_path / "work").mkdir()
    with pytest.raises(UserError, match=r"/nowhere/clip\.safetensors"):
        encoders.run(StageContext(preset, {}, tmp_path / "out", tmp_path / "work"))
