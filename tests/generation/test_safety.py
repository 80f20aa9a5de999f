"""The filter on generated clips."""

import numpy as np
import open_clip
import pytest
import torch

from svd.config import EncodersConfig
from svd.core.errors import UserError
from svd.generation.safety import load_safety_filter
from svd.model.formats.clip import build_clip, toy_config
from svd.model.safetensors import of_module, write_tensors


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = toy_config(16, 32)
    write_tensors(tmp_path / "clip.safetensors", of_module(build_clip(config, "test")))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    return EncodersConfig(model="small", weights=str(tmp_path / "clip.safetensors"))


def test_flagged_clips_are_blurred_and_others_untouched(tmp_path, encoder):
    """Heads that separate a bright clip from a dark one, fitted to the embeddings themselves."""
    bright = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.7
    dark = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 0.3
    np.savez(tmp_path / "zero.npz", weights=np.zeros((1, 32), np.float32), biases=np.zeros(1, np.float32))
    image = load_safety_filter(tmp_path / "zero.npz", encoder).image
    direction = (image(bright * 2 - 1) - image(dark * 2 - 1)).mean(0).detach()
    middle = ((image(bright * 2 - 1) + image(dark * 2 - 1)) / 2).mean(0).detach()
    scale = 50 / direction.norm() ** 2
    weights = torch.stack([direction * scale, torch.zeros(32)]).numpy()
    np.savez(tmp_path / "heads.npz", weights=weights, biases=np.array([-float(middle @ direction * scale), -9.0]))
    safety = load_safety_filter(tmp_path / "heads.npz", encoder)
    assert safety.scores(bright).min() > 0.9
    assert safety.scores(dark).max() < 0.1
    kept, flagged = safety.apply(dark)
    assert not flagged
    assert kept is dark
    mixed = torch.cat([dark[:1], bright[:1]])
    hidden, flagged = safety.apply(mixed)
    assert flagged
    assert hidden.shape == mixed.shape
    assert hidden.std((-1, -2)).max() < mixed.std((-1, -2)).min() / 4


def test_heads_that_cannot_be_used_are_named(tmp_path, encoder):
    with pytest.raises(UserError, match=r"absent\.npz: no such file"):
        load_safety_filter(tmp_path / "absent.npz", encoder)
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"not an \.npz with"):
        load_safety_filter(tmp_path / "bad.npz", encoder)
    np.savez(tmp_path / "other.npz", other=np.zeros(3))
    with pytest.raises(UserError, match="arrays 'weights' and 'biases'"):
        load_safety_filter(tmp_path / "other.npz", encoder)
    np.savez(tmp_path / "wide.npz", weights=np.zeros((1, 768)), biases=np.zeros(1))
    with pytest.raises(UserError, match="don't fit small, which gives 32 numbers"):
        load_safety_filter(tmp_path / "wide.npz", encoder)
