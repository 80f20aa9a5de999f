"""Scoring a unit: what is in memory at a time, and what captioners and encoders are given."""

from __future__ import annotations

import tracemalloc

import cv2
import kornia
import numpy as np
import polars as pl
import pytest
import torch
from curation_inputs import tiny, write_encoders
from measured_units import PICTURES, write_unit
from safetensors.torch import load_file

from svd.curation.scoring.unit import GROUP, ClipScorer
from svd.model.formats.encoders import load_encoders

HEIGHT, WIDTH = 540, 720


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = write_encoders(tmp_path_factory.mktemp("scoring") / "encoders")
    return load_encoders(folder, tiny().encoders)


def test_one_large_frame_is_in_memory_at_a_time(encoders, tmp_path, monkeypatch):
    """However many clips are scored together, and frames go through the encoder together."""
    unit = write_unit(tmp_path, GROUP + 4, HEIGHT, WIDTH)
    resize, resized = kornia.geometry.resize, []

    def watched(frames, *args, **options):
        resized.append(frames.numel())
        return resize(frames, *args, **options)

    monkeypatch.setattr(kornia.geometry, "resize", watched)
    tracemalloc.start()
    ClipScorer(encoders, [], ("sidecar", "motion")).score_unit(unit, tmp_path / "scored", 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]  # of numpy, not of torch
    tracemalloc.stop()
    assert peak < 6 * HEIGHT * WIDTH * 3, "the frames of two clips"
    assert max(resized) <= HEIGHT * WIDTH, "more than a plane of a frame"


class Describer:
    """Names the number of the picture in the middle of a clip."""

    name = "coca"

    def __init__(self, pictures):
        self.pictures, self.asked = pictures, []

    def describe(self, requests):
        self.asked += [(request.clip_id, dict(request.captions)) for request in requests]
        assert all(request.frames.shape == (3, HEIGHT, WIDTH, 3) for request in requests)
        assert all(request.video.read_bytes() for request in requests)
        seen = [np.abs(self.pictures - request.frames[1].astype(int)).mean((1, 2, 3)) for request in requests]
        return [f"picture {differences.argmin()}" for differences in seen]


class Repeater:
    """Repeats what the captioner before it has said."""

    name = "llm"

    def describe(self, requests):
        return [f"a {request.captions['coca']}" for request in requests]


class Plain:
    """Encoders with what scoring needs and no more."""

    def __init__(self, encoders):
        self.encoders, self.largest = encoders, 0

    def image_features(self, frames):
        self.largest = max(self.largest, frames.shape[-1])
        return self.encoders.image_features(frames)

    def text_features(self, texts):
        return self.encoders.text_features(texts)


def test_captioners_see_every_clip_with_its_frames(encoders, tmp_path):
    unit = write_unit(tmp_path, GROUP + 4, HEIGHT, WIDTH)
    paths = [unit / "pictures" / f"{number}.jpg" for number in range(PICTURES)]
    describer = Describer(np.stack([cv2.imread(str(path))[..., ::-1] for path in paths]).astype(int))
    scorer = ClipScorer(encoders, [describer, Repeater()], ("llm", "sidecar"))
    scores = pl.read_parquet(scorer.score_unit(unit, tmp_path / "scored", 1 << 20) / "scores.parquet")
    assert [name for name, _ in describer.asked] == scores["clip_id"].to_list()
    assert all(captions.keys() == {"motion", "sidecar"} for _, captions in describer.asked)
    for number, row in enumerate(scores.iter_rows(named=True)):
        captions = {caption["captioner"]: caption["text"] for caption in row["captions"]}
        assert captions == {"llm": f"a picture {(3 * number + 1) % PICTURES}", "sidecar": f"scene {number % 7}"}
        assert {value["captioner"] for value in row["similarities"]} == captions.keys()


def test_encoders_that_cannot_shrink_frames_get_them_whole(encoders, tmp_path):
    plain, found = Plain(encoders), []
    for name, which in (("shrunk", encoders), ("whole", plain)):
        unit = write_unit(tmp_path / name, 5, HEIGHT, WIDTH)
        scored = ClipScorer(which, [], ("motion",)).score_unit(unit, tmp_path / name / "scored", 1 << 20)
        found.append(load_file(scored / "embeddings.safetensors"))
    assert plain.largest == WIDTH
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=2e-3) for name in found[0])
