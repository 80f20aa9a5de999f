"""CLIP scores: batching, similarity, aesthetics heads, near duplicates."""

from __future__ import annotations

import tracemalloc

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from svd.catalogue import near_duplicates as duplicates
from svd.core.errors import UserError
from svd.curation.scoring import embeddings


class Encoders:
    """Features that depend on every pixel and every character."""

    def __init__(self):
        self.batches = []

    def image_features(self, frames):
        self.batches.append(len(frames))
        return torch.stack([frames.mean((2, 3))[:, i] for i in range(3)], 1) + 0.1

    def text_features(self, texts):
        return torch.tensor([[len(t), t.count("a"), 1.0] for t in texts])


def clips(count, seed=0):
    generator = np.random.default_rng(seed)
    shapes = [(3, 16, 24, 3), (3, 24, 16, 3)]
    return [generator.integers(0, 255, shapes[i % 2], np.uint8) for i in range(count)]


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_batches_change_nothing_and_are_filled_across_clips(batch):
    frames, encoders = clips(7), Encoders()
    found = embeddings.image_embeddings(frames, encoders, batch, "cpu")
    for clip, vectors in zip(frames, found, strict=True):
        alone = encoders.image_features(embeddings.frames_to_tensor(clip))
        assert torch.allclose(vectors, nn.functional.normalize(alone, dim=-1), atol=1e-6)
    assert found.shape == (7, 3, 3)
    assert torch.allclose(found.norm(dim=-1), torch.ones(7, 3))
    if batch == 64:
        assert encoders.batches[:2] == [12, 9]


def test_similarity_is_the_mean_over_frames_and_content_captions():
    images = nn.functional.normalize(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    captions = {"sidecar": "a cat", "coca": "banana", "motion": "the camera pans"}
    texts = embeddings.text_embeddings(list(captions.values()), Encoders(), 2)
    found = dict(embeddings.similarities(images, list(captions.items()), texts))
    for name, text in captions.items():
        expected = np.mean([float(torch.dot(image, texts[text])) for image in images])
        assert found[name] == pytest.approx(expected, abs=1e-5)
    assert embeddings.similarity_score(list(found.items())) == pytest.approx(
        (found["sidecar"] + found["coca"]) / 2, abs=1e-5
    )
    assert embeddings.similarity_score([("motion", 0.3)]) is None


def linear_head(path, width=8):
    weights = {"weight": torch.randn(1, width), "bias": torch.randn(1)}
    torch.save(weights, path)
    return lambda x: (x @ weights["weight"].T + weights["bias"]).squeeze(-1)


def mlp_head(path, width=8):
    state, inner = {}, []
    for index, (a, b) in zip((0, 2, 4, 6, 7), ((width, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True):
        layer = nn.Linear(a, b)
        inner.append(layer)
        state |= {f"layers.{index}.weight": layer.weight.detach(), f"layers.{index}.bias": layer.bias.detach()}
    save_file(state, path)
    return lambda x: nn.Sequential(*inner)(x).squeeze(-1)


@pytest.mark.parametrize(("write", "suffix"), [(linear_head, "pth"), (mlp_head, "safetensors")])
def test_both_published_aesthetics_heads_load(tmp_path, write, suffix):
    torch.manual_seed(0)
    path = tmp_path / f"head.{suffix}"
    reference = write(path)
    head = embeddings.load_aesthetics(path)
    images = nn.functional.normalize(torch.randn(5, 3, 8), dim=-1)
    with torch.inference_mode():
        assert torch.allclose(embeddings.aesthetics(images, head), reference(images).mean(1), atol=1e-5)
    with pytest.raises(UserError, match="width 8, the image encoder gives 4"):
        embeddings.aesthetics(images[..., :4], head)


def test_a_file_that_is_no_head_is_named(tmp_path):
    path = tmp_path / "head.safetensors"
    save_file({"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3)}, path)
    with pytest.raises(UserError, match=r"head\.safetensors: not a head of linear layers"):
        embeddings.load_aesthetics(path)
    with pytest.raises(UserError, match="does not exist"):
        embeddings.load_aesthetics(tmp_path / "gone.pth")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_the_most_similar_earlier_clip(count, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity, partner = duplicates.most_similar_earlier(vectors)
    assert partner[0] == -1
    for i in range(1, count):
        cosines = vectors[:i] @ vectors[i]
        assert cosines[partner[i]] == pytest.approx(cosines.max(), abs=1e-6)
        assert similarity[i] == pytest.approx(cosines.max(), abs=1e-6)


def test_cells_find_duplicates_among_many(monkeypatch):
    monkeypatch.setattr(duplicates, "EXACT", 100)
    monkeypatch.setattr(duplicates, "CELL", 50)
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(600, 16)).astype(np.float32)
    vectors[300:] = vectors[:300] + 0.001 * generator.normal(size=(300, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity, partner = duplicates.most_similar_earlier(vectors)
    assert (partner[300:] == np.arange(300)).mean() > 0.95
    assert np.quantile(similarity[:300], 0.9) < 0.9 < similarity[300:].min() + 0.2


def test_embeddings_are_read_into_one_array(tmp_path):
    generator, count, width = np.random.default_rng(0), 400, 512
    vectors = generator.normal(size=(count, 3, width)).astype(np.float16)
    names = [f"c{i}" for i in range(count)]
    units = generator.integers(0, 3, count)
    for unit in range(3):
        rows = {names[i]: torch.from_numpy(vectors[i]).contiguous() for i in np.flatnonzero(units == unit)}
        save_file(rows, tmp_path / f"clips-{unit:06d}.safetensors")
    clips = pl.DataFrame({"clip_id": names, "unit": units})
    duplicates.read_embeddings(clips.head(1), tmp_path)
    tracemalloc.start()
    found = duplicates.read_embeddings(clips, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = vectors.astype(np.float32).mean(1)
    assert np.allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    assert found.dtype == np.float32 and peak < 1.6 * found.nbytes
    assert duplicates.read_embeddings(clips.clear(), tmp_path).shape == (0, 0)


def test_duplicates_become_columns(tmp_path):
    vectors = torch.nn.functional.normalize(torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    vectors[2] = vectors[0]
    for unit in (0, 1):
        rows = {f"c{i}": vectors[i].half().contiguous() for i in range(4) if i // 2 == unit}
        save_file(rows, tmp_path / f"clips-{unit:06d}.safetensors")
    clips = pl.DataFrame({"clip_id": ["c0", "c1", "c2", "c3"], "unit": [0, 0, 1, 1]})
    found = duplicates.near_duplicates(clips, tmp_path)
    assert found["duplicate_of"][2] == "c0" and found["duplicate_similarity"][2] == pytest.approx(1, abs=1e-3)
    assert found["duplicate_of"][0] is None and found["duplicate_similarity"][0] is None


def test_an_nsfw_head_scores_the_worst_frame(tmp_path):
    torch.manual_seed(0)
    first, last = nn.Linear(8, 4), nn.Linear(4, 1)
    state = {"0.weight": first.weight, "0.bias": first.bias, "2.weight": last.weight, "2.bias": last.bias}
    save_file({name: value.detach().clone() for name, value in state.items()}, tmp_path / "nsfw.safetensors")
    scorer = embeddings.load_nsfw(tmp_path / "nsfw.safetensors")
    images = nn.functional.normalize(torch.randn(5, 3, 8), dim=-1)
    with torch.inference_mode():
        expected = torch.sigmoid(last(torch.relu(first(images)))).squeeze(-1).max(1).values
    assert torch.allclose(scorer.scores(images), expected, atol=1e-6)
    with pytest.raises(UserError, match="width 8, not 4"):
        scorer.scores(images[..., :4])
