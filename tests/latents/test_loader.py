"""Order, captions, dropout, noise levels and noise are functions of (seed, global sample index) alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_training import FRAMES, write_cache

from svd.core.errors import UserError
from svd.diffusion.edm import DiscreteSchedule
from svd.latents.batches import Buckets, IndexedLoader
from svd.latents.cache import LatentCache
from svd.latents.loader import Batch, Draws, Examples, shuffled

DRAWS = Draws(
    7, -1.2, 1.0, text_dropout=0.15, image_dropout=0.1, caption_probabilities=(("motion", 0.25), ("sidecar", 0.75))
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return LatentCache(write_cache(tmp_path_factory.mktemp("cache")))


def examples(cache: LatentCache, draws: Draws = DRAWS, frames: int = FRAMES) -> Examples:
    return Examples(cache, cache.index.rows, frames, draws)


def loader(data: Examples, steps: int, size: int, rank: int = 0, ranks: int = 1, workers: int = 0) -> IndexedLoader:
    return IndexedLoader(Buckets([data], [size], 7), steps, 1, rank, ranks, workers)


def by_index(batches: list[Batch]) -> dict[int, Batch]:
    """Single samples by their global index."""
    return {int(b["index"][k]): {n: v[k] for n, v in b.items()} for b in batches for k in range(len(b["index"]))}


def assert_equal(first: dict[int, Batch], second: dict[int, Batch]) -> None:
    assert first.keys() == second.keys()
    for index, sample in first.items():
        assert all(value.equal(second[index][name]) for name, value in sample.items()), index


@given(size=st.integers(1, 3000), key=st.text(max_size=8))
@settings(max_examples=30, deadline=None)
def test_the_order_of_an_epoch_is_a_permutation(size: int, key: str) -> None:
    assert sorted(shuffled(position, size, key) for position in range(size)) == list(range(size))


def test_the_order_is_shuffled_and_changes_with_the_epoch() -> None:
    first, second = ([shuffled(p, 1000, key) for p in range(1000)] for key in ("0/0", "0/1"))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
    neighbours = torch.corrcoef(torch.tensor([first[:-1], first[1:]]).float())[0, 1]
    assert abs(neighbours) < 0.15


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (4, 0)])
def test_ranks_and_workers_see_the_same_samples(cache: LatentCache, ranks: int, workers: int) -> None:
    data = examples(cache)
    alone = by_index(list(loader(data, 5, 8)))
    shared = [batch for rank in range(ranks) for batch in loader(data, 5, 8, rank, ranks, workers)]
    assert sorted(alone) == list(range(40))
    assert_equal(alone, by_index(shared))


def test_the_state_is_the_next_step(cache: LatentCache) -> None:
    data = examples(cache)
    whole = list(loader(data, 6, 4))
    first = loader(data, 6, 4)
    iterator = iter(first)
    taken = [next(iterator) for _ in range(2)]
    second = loader(data, 6, 4)
    second.load_state_dict(first.state_dict())
    assert first.state_dict() == {"next": 2}
    assert len(second) == len(first) == 6
    assert_equal(by_index(whole), by_index([*taken, *second]))


def test_a_resumed_run_may_have_another_number_of_ranks(cache: LatentCache) -> None:
    data = examples(cache)
    whole = by_index(list(loader(data, 6, 4)))
    alone = loader(data, 6, 4)
    iterator = iter(alone)
    parts = [next(iterator) for _ in range(3)]
    for rank in range(2):
        shared = loader(data, 6, 4, rank, 2)
        shared.load_state_dict(alone.state_dict())
        parts += list(shared)
    assert_equal(whole, by_index(parts))


def test_every_clip_comes_once_an_epoch_with_new_draws(cache: LatentCache) -> None:
    data = examples(cache)
    epochs = [[data[e * len(data) + k] for k in range(len(data))] for e in range(2)]
    rows = [[data.row(e * len(data) + k)["sample_id"] for k in range(len(data))] for e in range(2)]
    assert sorted(rows[0]) == sorted(rows[1]) == sorted({row["sample_id"] for row in data.rows})
    assert rows[0] != rows[1]
    same = rows[1].index(rows[0][0])
    assert not epochs[0][0]["noise"].equal(epochs[1][same]["noise"])
    assert not epochs[0][0]["latents"].equal(epochs[1][same]["latents"])


def test_draws_follow_their_distributions(cache: LatentCache) -> None:
    data, count = examples(cache), 3000
    log_sigma = torch.stack([DRAWS.sigma(i) for i in range(count)]).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.06)
    assert log_sigma.std().item() == pytest.approx(1.0, abs=0.05)
    assert 1 - sum(DRAWS.kept(i, "text", 0.15) for i in range(count)) / count == pytest.approx(0.15, abs=0.02)
    sample = cache.read(data.rows[0])
    chosen = Counter[str]()
    for index in range(count // 2):
        text = data._text(sample, index)
        names = [name for name, candidate in sample.texts if candidate.equal(text)]
        chosen[names[0] if names else "null"] += 1
    assert chosen["null"] / (count // 2) == pytest.approx(0.15, abs=0.03)
    assert chosen["motion"] / (chosen["motion"] + chosen["sidecar"]) == pytest.approx(0.25, abs=0.04)


def test_captions_of_three_captioners_are_drawn_as_the_paper_does(cache: LatentCache) -> None:
    """CoCa one half, V-BLIP and the LLM a quarter each (E.2.2); where one is missing the others keep their ratio."""
    shares = (("coca", 0.5), ("llm", 0.25), ("video", 0.25))
    data, count = examples(cache, Draws(7, -1.2, 1.0, caption_probabilities=shares)), 2000
    sample = cache.read(data.rows[0])
    texts = [(name, torch.full_like(cache.null_text, i + 1.0)) for i, name in enumerate(("coca", "video", "llm"))]

    def drawn(texts: list[tuple[str, torch.Tensor]]) -> dict[str, float]:
        some = replace(sample, texts=tuple(texts))
        chosen = [int(data._text(some, index).flatten()[0]) for index in range(count)]
        return {name: chosen.count(int(text.flatten()[0])) / count for name, text in texts}

    # 0.035: three standard deviations of a share of 0.5 among 2,000 draws.
    assert drawn(texts) == pytest.approx({"coca": 0.5, "video": 0.25, "llm": 0.25}, abs=0.035)
    assert drawn(texts[:2]) == pytest.approx({"coca": 2 / 3, "video": 1 / 3}, abs=0.035)
    assert drawn(texts[1:]) == pytest.approx({"video": 0.5, "llm": 0.5}, abs=0.035)


def test_each_signal_is_dropped_by_itself(cache: LatentCache) -> None:
    """Text, image and conditioning latent at their own rates (D.1), independently of each other."""
    data = examples(cache, Draws(7, -1.2, 1.0, text_dropout=0.3, image_dropout=0.2))
    samples = [data[i] for i in range(1500)]
    image, concat = (1 - torch.stack([s[name] for s in samples]) for name in ("keep_image", "keep_concat"))
    text = torch.tensor([float(s["text"].equal(cache.null_text)) for s in samples])
    for dropped, rate in ((text, 0.3), (image, 0.2), (concat, 0.2)):
        assert dropped.mean().item() == pytest.approx(rate, abs=0.035)
    for first, second, rate in ((image, concat, 0.04), (image, text, 0.06), (concat, text, 0.06)):
        assert (first * second).mean().item() == pytest.approx(rate, abs=0.02)


def test_the_conditioning_frames_noise_has_its_own_distribution(cache: LatentCache) -> None:
    """ln sigma ~ N(-3, 0.5^2), unrelated to the clip's noise level (D.4)."""
    data = examples(cache, Draws(7, 1.0, 1.6, pixels=True))
    pairs = torch.stack([torch.stack([s["conditioning_sigma"], s["sigma"]]) for s in (data[i] for i in range(1000))])
    logs = pairs.log()
    assert logs[:, 0].mean().item() == pytest.approx(-3, abs=0.06)
    assert logs[:, 0].std().item() == pytest.approx(0.5, abs=0.05)
    assert abs(torch.corrcoef(logs.T)[0, 1].item()) < 0.1


def test_the_ablations_draw_the_levels_of_stable_diffusion() -> None:
    levels = DiscreteSchedule().sigmas
    drawn = torch.stack([Draws(7, 0, 1, objective="discrete-v").sigma(i) for i in range(2000)])
    index = torch.searchsorted(levels, drawn)
    assert levels[index].equal(drawn)
    assert index.float().mean().item() == pytest.approx(499.5, abs=25)
    examined = torch.stack([Draws(7, 0, 1, objective="discrete-v", strata=8).sigma(i) for i in range(8)])
    assert examined.equal(levels[62::125])


def test_offset_noise_is_shared_by_the_frames(cache: LatentCache) -> None:
    plain, shifted = (examples(cache, Draws(7, 0, 1, offset_noise=s))[3]["noise"] for s in (0.0, 0.5))
    shift = shifted - plain
    assert shift.std(dim=(0, 2, 3)).max() < 1e-6
    assert shift.abs().max() > 0


def test_an_examination_is_stratified_and_fixed(cache: LatentCache) -> None:
    draws = Draws(1, 0.3, 1.4, text_dropout=1.0, image_dropout=1.0, strata=8)
    levels = torch.stack([draws.sigma(i) for i in range(8)])
    assert levels.log().mean().item() == pytest.approx(0.3, abs=1e-5)
    assert (levels.diff() > 0).all()
    data = examples(cache, draws)
    sample, moments = data[2], cache.read(data.rows[2]).moments
    assert sample["latents"].equal(moments[:, :4] * 0.5)
    assert sample["text"].equal(cache.read(data.rows[2]).texts[0][1])
    assert sample["keep_image"] == sample["keep_concat"] == 1


def test_fewer_frames_are_a_window_of_the_cached_ones(cache: LatentCache) -> None:
    data = examples(cache, DRAWS, frames=2)
    starts = set()
    for index in range(40):
        image, whole = data[index]["image"], cache.read(data.row(index)).image
        starts.add(next(k for k in range(3) if whole[k : k + 2].equal(image)))
    assert starts == {0, 1, 2}


JOINT = Draws(7, -1.2, 1.0, text_dropout=0.15, caption_probabilities=(("sidecar", 1.0),), image_share=0.4)


def test_images_take_the_place_of_a_share_of_the_clips(cache: LatentCache) -> None:
    """The clips that stay are those of a training without images; an examination has none."""
    plain, joint = (examples(cache, replace(JOINT, image_share=share)) for share in (0.0, 0.4))
    images = [bool(joint[k]["image_only"]) for k in range(600)]
    assert sum(images) / len(images) == pytest.approx(0.4, abs=0.05)
    assert "image_only" not in plain[0]
    shared = plain[0].keys() - {"text"}
    for index in range(40):
        first, second = plain[index], joint[index]
        assert second["text"].shape == (FRAMES, *first["text"].shape)
        if images[index]:
            assert second["motion_bucket"] == 0 and not first["latents"].equal(second["latents"])
            continue
        assert all(first[name].equal(second[name]) for name in shared), index
        assert all(text.equal(first["text"]) for text in second["text"])
    examined = examples(cache, replace(JOINT, strata=8))[2]
    assert "image_only" not in examined and examined["text"].ndim == 2


def test_images_are_frames_of_many_clips_each_with_its_own_caption(cache: LatentCache) -> None:
    data = examples(cache, replace(JOINT, text_dropout=0.0, image_share=1.0))
    every = [cache.read(row) for row in data.rows]
    sources = set()
    for index in range(30):
        example, found = data[index], []
        for image, text in zip(example["image"], example["text"], strict=True):
            clip, frame = next(
                (c, f) for c in range(len(every)) for f in range(FRAMES) if every[c].image[f].equal(image)
            )
            assert text.equal(every[clip].texts[0][1])
            found.append((clip, frame))
        means = torch.stack([every[clip].moments[frame, :4] for clip, frame in found]) * 0.5
        assert (example["latents"] - means).abs().max() < 0.2  # the posterior's noise
        sources |= set(found)
    assert len(sources) > 0.8 * len(every) * FRAMES


def test_an_offset_is_drawn_for_each_image(cache: LatentCache) -> None:
    plain, shifted = (examples(cache, Draws(7, 0, 1, offset_noise=s, image_share=1.0))[3]["noise"] for s in (0.0, 0.5))
    shift = shifted - plain
    assert shift.std(dim=(2, 3)).max() < 1e-6 and shift.std(dim=0).min() > 1e-3


def test_a_joint_training_is_the_same_on_any_number_of_ranks_and_when_resumed(cache: LatentCache) -> None:
    data = examples(cache, JOINT)
    whole = by_index(list(loader(data, 6, 4)))
    alone = loader(data, 6, 4)
    iterator = iter(alone)
    parts = [next(iterator) for _ in range(3)]
    for rank in range(2):
        shared = loader(data, 6, 4, rank, 2, workers=1)
        shared.load_state_dict(alone.state_dict())
        parts += list(shared)
    assert_equal(whole, by_index(parts))
    assert 0 < sum(bool(sample["image_only"]) for sample in whole.values()) < len(whole)


def test_a_folder_without_a_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the stage 'latents' first"):
        LatentCache(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_samples_are_one_line(workers: int, tmp_path: Path) -> None:
    cache = LatentCache(write_cache(tmp_path))
    for shard in (cache.folder / "shards").iterdir():
        shard.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"^\S+: 2 of \d+ samples are damaged, which is more than 1; delete") as caught:
        list(loader(examples(cache), 2, 4, workers=workers))
    assert "\n" not in str(caught.value)
