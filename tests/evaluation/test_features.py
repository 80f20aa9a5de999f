"""Feature networks: the real TransNetV2 reacts to damage; I3D's loader is exact about files, input and name."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation.frechet.distances import frechet
from evaluation.frechet.features import check_overlap, clip_digest, hash_path, load_extractor, metric_name
from evaluation.frechet.moments import MomentState
from evaluation.frechet.protocol import I3D, I3D_TORCHSCRIPT_SHA256, TRANSNETV2, VIDEOMAE, EvalProtocol, Resize
from svd.core.errors import UserError
from svd.synthetic.scenes import World, render_clip

PLAIN = EvalProtocol("plain", "test", TRANSNETV2, (), (), 8)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    world = World(3, "test")
    frames = [render_clip(world, i, 8, 54, 96, 8).frames for i in range(24)]
    return torch.from_numpy(np.stack(frames)).permute(0, 1, 4, 2, 3)


@pytest.fixture(scope="module")
def transnet():
    return load_extractor(TRANSNETV2, None, None)


def test_loading_leaves_the_global_state_alone() -> None:
    from evaluation.frechet import features

    features._transnetv2_network.cache_clear()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    load_extractor(TRANSNETV2, None, None)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert not torch.are_deterministic_algorithms_enabled()


def test_transnetv2_features(transnet, clips: Tensor) -> None:
    features = transnet.features(PLAIN, clips[:6].float())
    assert features.shape == (6, 1024) and features.dtype == np.float32 and (features >= 0).all()
    assert features.std() > 0.01
    one_by_one = np.concatenate([transnet.features(PLAIN, clip[None].float()) for clip in clips[:6]])
    np.testing.assert_allclose(features, one_by_one, atol=2e-5 * features.max())
    assert "TransNetV2" in transnet.weights and transnet.sha256[:12] in transnet.weights


def test_distance_grows_with_temporal_damage(transnet, clips: Tensor) -> None:
    """Shuffled clips hold the same pictures: only a network that sees time can tell them apart."""
    order = torch.tensor([3, 7, 0, 5, 2, 6, 1, 4])
    real, held_out = clips[::2], clips[1::2]
    sets = {"real": held_out, "shuffled": held_out[:, order], "noisy": torch.randint_like(held_out, 256)}
    reference = MomentState.of(transnet.features(PLAIN, real.float())).total()
    found = {
        name: frechet(reference, MomentState.of(transnet.features(PLAIN, part.float())).total()).value
        for name, part in sets.items()
    }
    assert found["real"] < found["shuffled"] < found["noisy"]


class Detector(nn.Module):
    """The call signature of the published TorchScript file, with features that show what came in."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert rescale and resize and return_features
        channels = x.mean(dim=[2, 3, 4])
        return torch.cat([channels, x[:, 0, 0, 0, 0:1], x[:, 1, 0, 0, 0:1]], dim=1)


@pytest.fixture
def torchscript(tmp_path: Path) -> Path:
    torch.jit.script(Detector()).save(str(tmp_path / "i3d_torchscript.pt"))
    return tmp_path / "i3d_torchscript.pt"


def test_i3d_gets_channels_first_in_0_to_255(torchscript: Path) -> None:
    net = dataclasses.replace(I3D, sha256=None, dimension=5)
    extractor = load_extractor(net, str(torchscript), hash_path(torchscript))
    protocol = EvalProtocol("p", "test", net, (), (), 9)
    clip = torch.zeros(1, 9, 3, 20, 30)
    clip[:, :, 0], clip[:, :, 1], clip[:, :, 2] = 10, 20, 250
    assert extractor.features(protocol, clip)[0].tolist() == [10, 20, 250, 10, 20]


def test_only_the_published_file_is_called_fvd(torchscript: Path) -> None:
    extractor = load_extractor(I3D, str(torchscript), None)
    assert metric_name(I3D, extractor.sha256) == "frechet_i3d"
    assert "not the published" in extractor.weights
    assert metric_name(I3D, I3D_TORCHSCRIPT_SHA256) == "fvd"
    assert metric_name(TRANSNETV2, I3D_TORCHSCRIPT_SHA256) == "frechet_transnetv2"


def test_features_of_another_size_are_refused(torchscript: Path) -> None:
    extractor = load_extractor(I3D, str(torchscript), None)
    with pytest.raises(UserError, match=r"shape \(5,\), not of 400 dimensions"):
        extractor.features(EvalProtocol("p", "test", I3D, (), (), 9), torch.full((1, 9, 3, 20, 30), 9.0))


def test_too_short_clips_are_refused(torchscript: Path) -> None:
    extractor = load_extractor(I3D, str(torchscript), None)
    with pytest.raises(ValueError, match="at least 9 frames"):
        extractor.features(dataclasses.replace(PLAIN, net=I3D), torch.zeros(1, 8, 3, 20, 30))


def test_missing_wrong_and_broken_weights(tmp_path: Path, torchscript: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.ucf101\.weights"):
        load_extractor(I3D, None, None)
    with pytest.raises(UserError, match="no such file"):
        load_extractor(VIDEOMAE, str(tmp_path / "absent"), None)
    with pytest.raises(UserError, match="SHA-256"):
        load_extractor(I3D, str(torchscript), "0" * 64)
    with pytest.raises(UserError, match="wheel"):
        load_extractor(TRANSNETV2, None, "0" * 64)
    (tmp_path / "broken.pt").write_bytes(b"PK no archive")
    with pytest.raises(UserError, match="not a TorchScript file"):
        load_extractor(I3D, str(tmp_path / "broken.pt"), None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not a VideoMAE folder"):
        load_extractor(VIDEOMAE, str(tmp_path / "folder"), None)


def test_videomae_features_are_those_of_cdfvd(tmp_path: Path, clips: Tensor) -> None:
    """Pixels in [0, 1], no ImageNet statistics, and the mean token after the norm that the classifier's head reads."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEModel

    config = VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = VideoMAEForVideoClassification(config).eval()
    torch.nn.init.normal_(model.fc_norm.weight)
    torch.nn.init.normal_(model.fc_norm.bias)
    model.save_pretrained(tmp_path / "mae")
    net = dataclasses.replace(VIDEOMAE, dimension=24, minimum_frames=8, input=(Resize(32, 32),))
    extractor = load_extractor(net, str(tmp_path / "mae"), None)
    small = torch.nn.functional.interpolate(clips[:2].flatten(0, 1).float(), size=(32, 32), mode="bilinear")
    with torch.no_grad():
        tokens = model.videomae(pixel_values=small.reshape(2, 8, 3, 32, 32) / 255).last_hidden_state
        expected = torch.nn.functional.layer_norm(tokens.mean(1), (24,), model.fc_norm.weight, model.fc_norm.bias)
    found = extractor.features(EvalProtocol("p", "test", net, (), (), 8), clips[:2].float())
    torch.testing.assert_close(torch.from_numpy(found), expected)
    VideoMAEModel(VideoMAEConfig(**{**config.to_dict(), "use_mean_pooling": False})).save_pretrained(tmp_path / "pre")
    with pytest.raises(UserError, match="without fc_norm"):
        load_extractor(net, str(tmp_path / "pre"), None)


def test_hash_of_a_folder_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    first = hash_path(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = hash_path(tmp_path)
    (tmp_path / "b").write_bytes(b"2")
    assert len({first, second, hash_path(tmp_path)}) == 3


def test_copies_are_found() -> None:
    real, generated = [f"r{i}" for i in range(100)], [f"g{i}" for i in range(100)]
    assert check_overlap(real, generated) == ()
    assert check_overlap(real, [*generated[1:], "r5"]) == ()
    with pytest.raises(ValueError, match="2 of 100 generated clips are identical"):
        check_overlap(real, [*generated[2:], "r5", "r6"])
    assert "1 of 100 generated" in check_overlap(real, [*generated[1:], "g1"])[0]
    clip = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    other = clip.clone()
    other[0, 0, 0, 0] = 1
    assert clip_digest(clip) == clip_digest(clip.clone()) != clip_digest(other)
