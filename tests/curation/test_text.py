"""Text detection: areas as unions, the shipped detector on drawn text, CRAFT's architecture and post-processing."""

from __future__ import annotations

import av
import cv2
import numpy as np
import pytest
import torch
from curation_inputs import SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import tiny_config

from svd.config import TextConfig
from svd.core.device import pick_device
from svd.core.errors import UserError
from svd.curation.captions.video import sample_frames
from svd.curation.measuring.child import load_networks
from svd.curation.text import craft
from svd.curation.text.base import area_ratio, text_areas
from svd.curation.text.dbnet import DBTextDetector
from svd.curation.text.registry import make_detector

boxes = st.tuples(st.integers(-5, 40), st.integers(-5, 30), st.integers(1, 30), st.integers(1, 30))


@settings(max_examples=60, deadline=None)
@given(st.lists(boxes, max_size=6))
def test_area_is_that_of_the_union_inside_the_frame(rectangles):
    covered = np.zeros((32, 48), bool)
    polygons = []
    for x, y, w, h in rectangles:
        polygons.append(np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]], float))
        covered[max(0, y) : max(0, y + h), max(0, x) : max(0, x + w)] = True
    assert area_ratio(polygons, 32, 48) == pytest.approx(covered.mean(), abs=1e-9)


def test_a_polygon_that_crosses_itself_does_not_break_the_area():
    bow = np.array([[0, 0], [10, 10], [10, 0], [0, 10]], float)
    assert area_ratio([bow], 10, 10) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def detector():
    return DBTextDetector()


@pytest.fixture(scope="module")
def clean():
    """Frames of real footage without text."""
    return sample_frames(SAMPLES / "big-buck-bunny.mp4", 4).images


def subtitled(frame: np.ndarray, text: str, height: int) -> np.ndarray:
    """White text with a black outline near the bottom, capitals `height` pixels high."""
    drawn = np.ascontiguousarray(frame)
    scale = cv2.getFontScaleFromHeight(cv2.FONT_HERSHEY_SIMPLEX, height, 2)
    place = (frame.shape[1] // 8, int(frame.shape[0] * 0.92))
    for colour, thickness in (((0, 0, 0), max(3, height // 4)), ((255, 255, 255), max(1, height // 12))):
        cv2.putText(drawn, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, thickness, cv2.LINE_AA)
    return drawn


def test_subtitles_are_found_where_they_are_and_clean_frames_stay_clean(detector, clean):
    assert max(text_areas(clean, detector)) < 0.005
    for frame in clean:
        height, width = frame.shape[:2]
        found = detector.polygons(subtitled(frame, "this is what they say", height // 24))
        assert 0.005 < area_ratio(found, height, width) < 0.15
        assert all(polygon[:, 1].mean() > 0.75 * height for polygon in found)


def frames_at(name: str, *seconds: float) -> list[np.ndarray]:
    """The frames (H, W, 3) of a sample that are shown at these seconds, as the decode pass keeps them."""
    frames = []
    with av.open(str(SAMPLES / name), "r") as container:
        stream = container.streams.video[0]
        start = float((stream.start_time or 0) * (stream.time_base or 0))
        for frame in container.decode(stream):
            if len(frames) < len(seconds) and float(frame.time or 0) - start >= seconds[len(frames)]:
                frames.append(frame.to_ndarray(format="rgb24"))
    assert len(frames) == len(seconds)
    return [cv2.resize(f, (768, 768 * f.shape[0] // f.shape[1]), interpolation=cv2.INTER_AREA) for f in frames]


def test_plain_letters_on_footage_are_found(detector):
    """White or black letters without an outline, the x-height 8 pixels of a kept frame: of 24 pixels at 720p."""
    meadow = frames_at("big-buck-bunny-trailer.mp4", 4, 7, 10, 18, 22)
    houses = frames_at("city-night.mpg", 0.2, 1.2)
    missed = []
    for i, (frame, white) in enumerate([*((f, w) for f in meadow for w in (255, 0)), *((f, 255) for f in houses)]):
        drawn = np.ascontiguousarray(frame)
        place = (200, int(0.94 * frame.shape[0]))
        shade = (white, white, white)
        cv2.putText(drawn, "What did you say to him?", place, cv2.FONT_HERSHEY_SIMPLEX, 0.55, shade, 1, cv2.LINE_AA)
        found = [p for p in detector.polygons(drawn) if p[:, 1].mean() > 0.85 * frame.shape[0]]
        missed += [i] if area_ratio(found, *frame.shape[:2]) < 0.005 else []
    assert not missed


def test_what_the_network_mistakes_for_text_is_dropped(detector):
    """Three animals in a row before a meadow, and a soft sky, cover a fifth of the network's map and more."""
    mistaken = frames_at("big-buck-bunny-trailer.mp4", 21.25, 21.5, 21.75)
    assert all((detector.probability(frame) > 0.5).mean() > 0.03 for frame in mistaken)
    assert text_areas(mistaken, detector) == [0.0, 0.0, 0.0]


def rectangle_map(width: int, height: int, probability: float) -> np.ndarray:
    """A text map (192, 352) with one rectangle in its middle."""
    drawn = np.zeros((192, 352), np.float32)
    drawn[96 - height // 2 : 96 + height // 2, 176 - width // 2 : 176 + width // 2] = probability
    return drawn


@pytest.mark.parametrize(
    ("width", "height", "probability", "lines"),
    [
        (120, 6, 0.6, 1),  # a line of small letters
        (120, 6, 0.45, 0),
        (100, 40, 0.7, 0),  # as high as a title, but not as sure
        (100, 40, 0.95, 1),
        (180, 100, 1.0, 0),  # higher than any line
        (24, 18, 0.9, 0),  # one character
        (20, 40, 0.9, 0),  # a face
        (10, 80, 0.9, 1),  # a line that stands upright
    ],
)
def test_large_lines_must_be_surer_and_upright_ones_longer(detector, monkeypatch, width, height, probability, lines):
    monkeypatch.setattr(detector, "probability", lambda frame: rectangle_map(width, height, probability))
    assert len(detector.polygons(np.zeros((192, 352, 3), np.uint8))) == lines


def test_frames_of_any_aspect_are_seen_at_one_area_and_small_videos_are_not_enlarged(detector):
    assert detector.input_size(128, 192) == (128, 192)
    assert detector.input_size(720, 1280) == (384, 704)
    assert detector.input_size(1280, 720) == (704, 384)
    assert detector.input_size(576, 768) == (448, 608)
    assert all(side % 32 == 0 and side > 0 for side in (*detector.input_size(1, 1), *detector.input_size(2000, 10)))
    text = subtitled(np.full((128, 192, 3), 90, np.uint8), "hello", 14)
    assert area_ratio(detector.polygons(text), 128, 192) > 0.02


def test_what_looks_like_one_big_character_is_no_text(detector):
    def drawn(text: str) -> np.ndarray:
        frame = np.full((128, 192, 3), (200, 120, 20), np.uint8)
        return cv2.putText(frame, text, (30, 80), cv2.FONT_HERSHEY_SIMPLEX, 1.4, (255, 255, 255), 4, cv2.LINE_AA)

    assert detector.probability(drawn("8")).max() > 0.5, "the network itself sees a character"
    assert detector.polygons(drawn("8")) == []
    assert len(detector.polygons(drawn("8 dogs"))) >= 1


def test_what_stands_at_an_angle_must_be_a_long_line(detector):
    def turned(text: str, angle: float) -> np.ndarray:
        frame = subtitled(np.full((416, 736, 3), (60, 110, 40), np.uint8), text, 22)
        turn = cv2.getRotationMatrix2D((92 + 12 * len(text), 375), angle, 1.0)
        return cv2.warpAffine(frame, turn, (736, 416), borderMode=cv2.BORDER_REPLICATE)

    assert len(detector.polygons(turned("small", 0))) == 1
    assert detector.polygons(turned("small", 15)) == []
    assert len(detector.polygons(turned("this is what they say today", 8))) >= 1


def test_craft_has_the_published_names_and_loads_them(tmp_path):
    torch.manual_seed(0)
    model = craft.Craft()
    state = model.state_dict()
    shapes = {
        "basenet.slice1.0.weight": (64, 3, 3, 3),
        "basenet.slice1.11.running_mean": (128,),
        "basenet.slice2.14.weight": (256, 128, 3, 3),
        "basenet.slice3.27.weight": (512, 512, 3, 3),
        "basenet.slice4.38.bias": (512,),
        "basenet.slice5.1.weight": (1024, 512, 3, 3),
        "basenet.slice5.2.weight": (1024, 1024, 1, 1),
        "upconv1.conv.0.weight": (512, 1536, 1, 1),
        "upconv2.conv.3.weight": (128, 256, 3, 3),
        "upconv4.conv.4.running_var": (32,),
        "conv_cls.8.weight": (2, 16, 1, 1),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert sum(p.numel() for p in model.parameters()) == 20_770_466
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "craft.pth")
    loaded = craft.load_craft(tmp_path / "craft.pth")
    assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in state)
    detector = make_detector(
        TextConfig(detector="craft", craft_weights=str(tmp_path / "craft.pth"), craft_long_side=96)
    )
    assert isinstance(detector.polygons(np.zeros((48, 64, 3), np.uint8)), list)
    config = TextConfig(detector="craft", craft_weights=str(tmp_path / "craft.pth"))
    assert make_detector(config).model is detector.model, "the weights are read once a process"
    assert (detector.long_side, make_detector(config).long_side) == (96, 1280)
    with torch.inference_mode():
        assert loaded(torch.zeros(1, 3, 64, 96)).shape == (1, 32, 48, 2)


def test_craft_has_seen_a_picture_before_memory_is_limited(tmp_path, monkeypatch):
    """CUDA's libraries load with the first; their memory is no source's fault."""
    torch.save(craft.Craft().state_dict(), tmp_path / "craft.pth")
    forward, seen = craft.Craft.forward, []
    monkeypatch.setattr(craft.Craft, "forward", lambda self, x: seen.append(x.shape) or forward(self, x))
    threads = torch.get_num_threads()
    try:
        device = load_networks(tiny_config(text__detector="craft", text__craft_weights=str(tmp_path / "craft.pth")))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1 and device == pick_device()


def test_a_lack_of_memory_in_craft_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(craft, "shared_craft", lambda *args: lambda pixels: torch.empty(1 << 60, dtype=torch.uint8))
    detector = craft.CraftTextDetector(tmp_path / "craft.pth", device="cpu")
    with pytest.raises(MemoryError):
        detector.polygons(np.zeros((64, 64, 3), np.uint8))


def test_craft_joins_characters_into_words():
    region, affinity = np.zeros((60, 120), np.float32), np.zeros((60, 120), np.float32)
    for x in (20, 32, 44):
        region[20:30, x : x + 8] = 0.9
    affinity[22:28, 26:46] = 0.8
    region[40:48, 80:100] = 0.9
    region[5:9, 100:110] = 0.5  # never sure enough
    words = craft.word_boxes(region, affinity)
    assert len(words) == 2
    first, second = sorted(words, key=lambda box: box[:, 0].mean())
    assert first[:, 0].min() <= 20 and first[:, 0].max() >= 51
    assert abs(second.mean(0) - [89.5, 43.5]).max() < 2


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), (b"nonsense", "is not CRAFT")])
def test_missing_or_foreign_weights_are_named(tmp_path, content, message):
    path = tmp_path / "craft.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        make_detector(TextConfig(detector="craft", craft_weights=str(path)))
    with pytest.raises(UserError, match="craft_weights is not set"):
        make_detector(TextConfig(detector="craft"))
