"""The latent cache: which frames of which clips at which rate, its identity, its determinism and its resuming."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from toy_training import SIZE, toy_preset, write_toy_autoencoder

from svd.catalogue.schema import CLIPS_SCHEMA
from svd.catalogue.shards import ShardWriter
from svd.catalogue.tables import read_clips
from svd.config import Geometry
from svd.core.errors import UserError
from svd.latents import stage as latents
from svd.latents.cache import LatentCache
from svd.latents.windows import UnreadableClip, choose_windows, cover_frames, decode_frames
from svd.media.video import write_mp4
from svd.model.autoencoder import Autoencoder
from svd.model.formats.folders import load_autoencoder, save_autoencoder
from svd.stage import StageContext

CLIPS = {"a": 40, "b": 30, "c": 9, "d": 35, "e": 5}
LEVELS = 6


def grey_clip(folder: Path, frames: int) -> bytes:
    """A clip whose frame k has the grey level 6 k."""
    path = folder / f"{frames}.mp4"
    pictures = np.stack([np.full((32, 48, 3), LEVELS * k, np.uint8) for k in range(frames)])
    write_mp4(path, pictures, 24, crf=4)
    return path.read_bytes()


def write_catalogue(curation: Path, rows: list[dict[str, Any]]) -> None:
    (curation / "catalogue").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, CLIPS_SCHEMA), curation / "catalogue" / "clips.parquet")


class FakeImages(torch.nn.Module):
    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.mean(dim=(2, 3))


class FakeTexts(torch.nn.Module):
    def forward(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[[float(len(text)), 1.0]] for text in texts])


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageContext:
    """A curation output with five clips: one too short, one dropped, one for testing."""
    curation = tmp_path / "curation"
    rows: list[dict[str, Any]] = []
    with ShardWriter(curation / "shards", 10**6) as writer:
        for name, frames in CLIPS.items():
            member = writer.add(name, {"mp4": grey_clip(tmp_path, frames)})["mp4"]
            rows.append(row(name, frames, member))
    write_catalogue(curation, rows)
    encoders = tmp_path / "encoders"
    encoders.mkdir()
    save_file({"x": torch.zeros(1)}, encoders / "clip.safetensors")
    monkeypatch.setattr(
        latents, "load_encoders", lambda *_: SimpleNamespace(text=FakeTexts(), image=FakeImages(), label="fake")
    )
    inputs = {
        "curation": curation,
        "encoders": encoders,
        "autoencoder": write_toy_autoencoder(tmp_path / "autoencoder"),
    }
    (tmp_path / "work").mkdir()
    return StageContext(toy_preset(), inputs, tmp_path / "out", tmp_path / "work")


def row(name: str, frames: int, member: Any) -> dict[str, Any]:
    return {
        "clip_id": name,
        "source_id": f"source-{name}",
        "split": "test" if name == "b" else "footage" if name == "a" else "train",
        "frames": frames,
        "fps": 24.0,
        "motion_score": 1.0,
        "motion_bucket": 99,
        "similarity": 0.3,
        "text_area": 0.0,
        "camera": "static",
        "captions": [{"captioner": "sidecar", "text": name * 3}, {"captioner": "motion", "text": "still"}],
        "keep": name != "d",
        "shard": member.shard,
        "offset": member.offset,
        "size": member.size,
    }


@given(
    frames=st.integers(1, 400),
    fps=st.sampled_from([5.0, 12.0, 23.976, 24.0, 29.97, 60.0]),
    wanted=st.integers(1, 25),
    windows=st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_windows_fit_their_clip_and_rate(frames: int, fps: float, wanted: int, windows: int) -> None:
    chosen = choose_windows("clip", frames, fps, wanted, (5, 30), windows)
    assert chosen == choose_windows("clip", frames, fps, wanted, (5, 30), windows)
    assert len(chosen) <= windows
    for window in chosen:
        assert len(window.indices) == wanted
        assert window.indices[0] >= 0 and window.indices[-1] < frames
        assert window.fps == fps / window.stride <= 30 + 1e-3
    enough = (wanted - 1) * -(-fps // 30) + 1 <= frames
    assert bool(chosen) == enough


def test_rates_spread_over_their_range() -> None:
    rates = [w.fps for k in range(300) for w in choose_windows(f"clip {k}", 1000, 60, 8, (5, 30), 1)]
    assert min(rates) <= 6 and max(rates) == 30
    assert 14 < float(np.mean(rates)) < 21


def test_decoding_returns_the_wanted_frames(tmp_path: Path) -> None:
    found = decode_frames(grey_clip(tmp_path, 30), {0, 7, 29})
    assert {number: round(float(picture.mean()) / LEVELS) for number, picture in found.items()} == {0: 0, 7: 7, 29: 29}
    with pytest.raises(UnreadableClip, match="ends before frame 30"):
        decode_frames(grey_clip(tmp_path, 30), {3, 30})
    with pytest.raises(UnreadableClip, match="can't be decoded"):
        decode_frames(b"not a video", {0})


def test_pictures_are_covered_and_cropped_in_the_middle() -> None:
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70, 1] = 200
    fitted = cover_frames([picture], 20, 20)
    assert fitted.shape == (1, 3, 20, 20) and fitted.dtype == torch.uint8
    assert (fitted[0, 1, :, 2:-2] - 200.0).abs().max() <= 4 and not fitted[0, [0, 2]].any()


def test_the_stage_caches_kept_clips_of_sufficient_length(context: StageContext) -> None:
    report = latents.run(context)
    cache = LatentCache(context.output)
    assert cache.index.values("clip_id") == ["a", "b", "c"]
    assert {row["clip_id"]: row["split"] for row in cache.index.rows} == {
        "a": "train", "b": "test", "c": "train",
    }  # fmt: skip
    assert report.metrics["clips_too_short_or_unreadable"] == 1
    assert report.metrics["samples_test"] == context.preset.latents.windows
    phase = context.preset.video_pretraining.phases[0]
    autoencoder = load_autoencoder(context.inputs["autoencoder"])
    for found in cache.rows(phase, "train"):
        sample = cache.read(found)
        grey = (sample.image[:, 0] + 1) * 127.5 / LEVELS
        stride = 24 / found["fps"]
        assert torch.allclose(grey.diff(), torch.full((3,), stride), atol=0.35)
        assert torch.allclose(sample.frame.mean(), sample.image[0].mean(), atol=0.01)
        frames = sample.image.mean(dim=1)[:, None, None, None].expand(-1, 3, SIZE, SIZE)
        with torch.no_grad():
            expected = autoencoder.encode(frames[None])[0]
        assert torch.allclose(sample.moments, expected, atol=0.15)
        assert [c for c, _ in sample.texts] == ["sidecar", "motion"]
        assert sample.texts[0][1].tolist() == [[3.0, 1.0]] and sample.texts[1][1].tolist() == [[5.0, 1.0]]
    assert cache.null_text.tolist() == [[0.0, 1.0]]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_killed_run_keeps_its_shards_and_ends_in_the_same_bytes(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = context.preset.latents.model_copy(update={"samples_per_shard": 2})
    preset = context.preset.model_copy(update={"latents": config})
    whole = StageContext(preset, context.inputs, context.output, context.work)
    latents.run(whole)
    (context.work.parent / "again").mkdir()
    second = StageContext(preset, context.inputs, context.work.parent / "out2", context.work.parent / "again")
    encode, calls = latents.LatentEncoder.videos, 0

    def fail(self: latents.LatentEncoder, frames: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return encode(self, frames)

    monkeypatch.setattr(latents.LatentEncoder, "videos", fail)
    with pytest.raises(KeyboardInterrupt):
        latents.run(second)
    assert len(list((second.work / "shards").glob("*.json"))) == 1
    latents.run(second)
    shards = len(list((context.output / "shards").glob("*.safetensors")))
    assert calls == shards + 1, "a finished shard was encoded again"
    assert folder_bytes(context.output) == folder_bytes(second.output)


def test_other_weights_or_sizes_make_other_samples(context: StageContext) -> None:
    clips = latents.with_split(read_clips(context.inputs["curation"]))
    config = context.preset.latents

    def ids(config: Any, identity: str) -> set[str]:
        return {job.sample_id for shard in latents.plan_shards(clips, config, identity) for job in shard}

    assert ids(config, "one") == ids(config, "one")
    assert not ids(config, "one") & ids(config, "two")
    larger = config.model_copy(update={"geometries": [Geometry(frames=4, height=32, width=32)]})
    assert not ids(config, "one") & ids(larger, "one")
    before = latents.LatentEncoder(context.inputs["autoencoder"], context.inputs["encoders"], context).identity
    torch.manual_seed(9)
    save_autoencoder(Autoencoder(load_autoencoder(context.inputs["autoencoder"]).config), context.inputs["autoencoder"])
    assert latents.LatentEncoder(context.inputs["autoencoder"], context.inputs["encoders"], context).identity != before


def test_without_test_sources_some_are_held_out() -> None:
    clips = pl.DataFrame({"clip_id": list("abcd"), "source_id": list("xxyz"), "split": ["train"] * 4})
    split = latents.with_split(clips)
    assert set(split["split"]) == {"train", "test"}
    by_source = split.group_by("source_id").agg(pl.col("split").n_unique())
    assert by_source["split"].to_list() == [1, 1, 1]


def test_nothing_to_cache_is_one_clear_error(context: StageContext) -> None:
    curation = context.inputs["curation"]
    write_catalogue(curation, [{**clip, "keep": False} for clip in read_clips(curation).to_dicts()])
    with pytest.raises(UserError, match="yields a training sample"):
        latents.run(context)


def test_a_damaged_clip_is_left_out(context: StageContext) -> None:
    curation = context.inputs["curation"]
    clips = read_clips(curation).to_dicts()
    write_catalogue(curation, [{**clip, "size": 100 if clip["clip_id"] == "c" else clip["size"]} for clip in clips])
    report = latents.run(context)
    assert report.metrics["clips_too_short_or_unreadable"] == 2
    assert "c" not in LatentCache(context.output).index.values("clip_id")
