"""Scored, trained on, evaluated and looked at: one picture, whatever the pixels, fields and colours of the file."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import av.error
import av.filter
import cv2
import numpy as np
import pytest
from media_files import MATRICES, Kind, decode_rgb, scenery, shots, shown, tiny_config, write

from svd.catalogue.browser.app import transcode
from svd.curation.base.types import SourceFailure
from svd.curation.captions.video import sample_frames
from svd.curation.clips.writer import write_clips
from svd.curation.measuring.decode_pass import analyse
from svd.latents.windows import decode_frames
from svd.media.shown import shown_rgb
from svd.media.tone_map import from_hlg, from_pq, to_pq, tone_map
from svd.media.video import read_frames
from svd.training.frames import read_clip_frames as read_training_frames

FLAT = {"cuts__passes": [{"detector": "content", "threshold": 250}]}  # no cuts: one clip a file
PQ, HLG = (9, 9, 16, 1), (9, 9, 18, 1)
FIELDS = {"flags": "+ildct+ilme", "top": "1", "qscale": "2"}
# Each kind with FFmpeg's filters for the picture that it shows.
KINDS = {
    "wide pixels": (Kind(aspect=Fraction(2)), "scale=192:64:flags=bicubic"),
    "narrow pixels, turned": (
        Kind(aspect=Fraction(8, 9), matrix=MATRICES["clockwise"]),
        "scale=86:64:flags=bicubic,transpose=clock",
    ),
    "interlaced": (Kind(suffix="mpg", codec="mpeg2video", options=FIELDS), "bwdif=mode=send_frame"),
    "interlaced, wide pixels": (
        Kind(suffix="mpg", codec="mpeg2video", options=FIELDS, aspect=Fraction(32, 27)),
        "bwdif=mode=send_frame,scale=114:64:flags=bicubic",
    ),
    "BT.709": (Kind(colours=(1, 1, 1, 1)), "scale=in_color_matrix=bt709"),
    "full range": (Kind(colours=(5, 5, 6, 2)), "scale=in_range=pc"),
    "BT.2020, 10 bit": (Kind(colours=(9, 9, 14, 1), pixel_format="yuv420p10le"), "scale=in_color_matrix=bt2020"),
}


def differ(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference in levels; pictures of other frames or shapes differ by 20 and more."""
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other).mean())


def filtered(path: Path, filters: str) -> list[np.ndarray]:
    """All frames through FFmpeg's filters, as RGB."""
    graph = av.filter.Graph()
    pictures = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        steps = [step.partition("=") for step in [*filters.split(","), "format=rgb24"]]
        nodes = [graph.add_buffer(template=stream), *(graph.add(name, options or None) for name, _, options in steps)]
        for one, other in itertools.pairwise([*nodes, graph.add("buffersink")]):
            one.link_to(other)
        graph.configure()
        for frame in [*container.decode(stream), None]:
            graph.push(frame)
            while True:
                try:
                    pictures.append(graph.pull().to_ndarray())
                except (av.error.BlockingIOError, av.error.EOFError):
                    break
    return pictures


def woven(frames: list[np.ndarray]) -> list[np.ndarray]:
    """Pairs of frames as the fields of one."""
    rows = (np.arange(frames[0].shape[0]) % 2 == 0)[:, None, None]
    return [np.where(rows, a, b) for a, b in zip(frames[::2], frames[1::2], strict=True)]


def readers(path: Path, height: int, width: int) -> dict[str, list[np.ndarray]]:
    """The frames of a clip as each part of the system reads them."""
    preview = path.with_name("preview.mp4")
    preview.write_bytes(transcode(path.read_bytes()))
    count = len(decode_rgb(path))
    training = read_training_frames(path.read_bytes(), count, height, width)
    return {
        "training, second stage": list(decode_frames(path.read_bytes(), set(range(count))).values()),
        "training, first stage": list(training.permute(0, 2, 3, 1).numpy()),
        "evaluation": list(read_frames(path)[0]),
        "captions": sample_frames(path, count).images,
        "preview": decode_rgb(preview),
    }


@pytest.mark.parametrize("name", KINDS)
def test_copied_and_reencoded_clips_show_what_ffmpeg_shows(name: str, tmp_path: Path) -> None:
    """To every reader, and in the stills that are scored."""
    kind, filters = KINDS[name]
    frames = list(shots([48], height=64, width=96, speed=0.5, seed=3))
    source = write(tmp_path / "source", woven(frames) if "interlaced" in name else frames[:24], kind=kind)
    expected = filtered(source, filters)
    analysis = analyse(source, tiny_config(**FLAT))
    (clip,) = analysis.clips
    copied, encoded = clip.span, replace(clip.span, method="reencode")
    targets = tmp_path / "copied.mp4", tmp_path / "encoded.mp4"
    write_clips(source, analysis.facts, [(copied, targets[0]), (encoded, targets[1])])
    height, width = expected[0].shape[:2]
    for still, number in zip(clip.frames, [round(s * 24) for s in clip.frame_seconds], strict=True):
        assert differ(still, expected[number - round(clip.span.start_seconds * 24)]) < 4
    for target in targets:
        for reader, pictures in readers(target, height, width).items():
            assert len(pictures) == len(expected) == 24
            most = max(map(differ, pictures, expected))
            # A coder's error in encoded clips and previews; in copies FFmpeg's fast and exact conversions differ.
            limit = 8 if reader == "preview" else 2.5 if target == targets[0] else 5
            assert most < limit, (reader, target.name)
    assert max(map(differ, decode_rgb(targets[1]), expected)) < 5, "the re-encoded pixels themselves are those shown"


def test_an_ordinary_frame_is_only_converted(tmp_path: Path) -> None:
    """Bit for bit what PyAV's plain conversion gives; of unmarked HD, in the colours that players assume."""
    small = write(tmp_path / "small", [scenery(1, 64, 96)] * 2)
    large = write(tmp_path / "large", [scenery(1, 720, 1280)] * 2)
    for path, matrix in ((small, None), (large, "ITU709")):
        with av.open(str(path)) as container:
            ((_, picture),) = shown_rgb(container, {0})
        with av.open(str(path)) as container:
            plain = next(container.decode(video=0)).to_ndarray(format="rgb24", src_colorspace=matrix)
        assert np.array_equal(picture, plain)
    (clip,) = analyse(write(tmp_path / "film", [scenery(1, 720, 1280)] * 24), tiny_config(**FLAT)).clips
    assert differ(clip.frames[0], cv2.resize(picture, (768, 432), interpolation=cv2.INTER_AREA)) < 3


@pytest.mark.parametrize(("colours", "name"), [(PQ, "PQ"), (HLG, "HLG")])
def test_hdr_is_refused_or_mapped_alike_for_every_reader(colours, name: str, tmp_path: Path) -> None:
    kind = Kind(codec="libx265", pixel_format="yuv420p10le", colours=colours, options={"x265-params": "log-level=none"})
    kind = replace(kind, matrix=MATRICES["clockwise"], aspect=Fraction(4, 3))
    # Pale colours: those of BT.2020 that a BT.709 screen lacks have no room for a coder's errors.
    frames = [f // 4 + (f.mean(2, keepdims=True) * 0.75).astype(np.uint8) for f in shots([24], 72, 96, 3, 0.5)]
    source = write(tmp_path / "source", frames, kind=kind)
    with pytest.raises(SourceFailure, match=rf"HDR \({name}\).*curation.hdr: tonemap"):
        analyse(source, tiny_config(**FLAT))
    analysis = analyse(source, tiny_config(hdr="tonemap", **FLAT))
    (clip,) = analysis.clips
    copied, encoded = clip.span, replace(clip.span, method="reencode")
    targets = tmp_path / "copied.mp4", tmp_path / "encoded.mp4"
    write_clips(source, analysis.facts, [(copied, targets[0]), (encoded, targets[1])])
    mapped = tone_map(frames[0].astype(np.uint16) * 257, name)
    wide = av.VideoFrame.from_ndarray(mapped, format="rgb24").reformat(width=128, interpolation="BICUBIC").to_ndarray()
    expected = shown(wide, MATRICES["clockwise"])
    assert differ(mapped, frames[0]) > 15
    assert differ(clip.frames[0], expected) < 8
    for target in targets:
        for reader, pictures in readers(target, *expected.shape[:2]).items():
            assert differ(pictures[0], expected) < 8, (reader, target.name)


def test_tone_mapping_follows_the_standards() -> None:
    """BT.2100's curves at their published points; grey stays grey; below the knee a screen shows the same light."""
    assert from_pq(np.array([0.0, 0.5081, 0.5807, 0.7518, 1.0])) == pytest.approx([0, 100, 203, 1000, 10000], rel=2e-3)
    assert to_pq(from_pq(np.linspace(0.01, 1, 9))) == pytest.approx(np.linspace(0.01, 1, 9), abs=1e-6)
    assert from_hlg(np.array([0.0, 0.5, 0.75, 1.0])) == pytest.approx([0, 1 / 12, 0.265, 1], abs=1e-3)
    nits = np.array([0.1, 1, 10, 50, 85, 203, 400, 1000, 4000])
    codes = np.rint(to_pq(nits) * 65535).astype(np.uint16)
    grey = tone_map(np.repeat(codes[None, :, None], 3, 2), "PQ")[0]
    assert (grey.max(1) - grey.min(1)).max() <= 1
    values = grey[:, 1].astype(int)
    assert values[:5] == pytest.approx(255 * (nits[:5] / 203) ** (1 / 2.4), abs=0.7)
    assert (np.diff(values[:8]) > 0).all() and 200 < values[5] < 240 and list(values[-2:]) == [255, 255]
    # The reference display shows three quarters of HLG's signal as diffuse white, as PQ does 58 %.
    white = tone_map(np.full((1, 1, 3), round(0.75 * 65535), np.uint16), "HLG")[0, 0, 1]
    assert abs(int(white) - values[5]) <= 1
    # BT.709's red, written in BT.2020, is red again.
    red = from_pq(np.array([0.5])) * np.array([0.6274, 0.0691, 0.0164])
    shown_red = tone_map(np.rint(to_pq(red) * 65535).astype(np.uint16)[None, None], "PQ")[0, 0]
    assert shown_red[0] > 140 and shown_red[1:].max() < 12
