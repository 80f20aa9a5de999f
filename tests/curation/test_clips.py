"""Clips hold exactly the frames that their row says, whatever the source is like."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from media_files import Kind, decode_rgb, shots, tiny_config, write

from svd.catalogue.axes import axes_computed
from svd.catalogue.schema import MEASURED_SCHEMA
from svd.curation.base.types import ClipAnalysis, SourceAnalysis, SourceFailure
from svd.curation.clips.writer import write_clip, write_clips
from svd.curation.decoding import decoder as decode
from svd.curation.measuring.decode_pass import analyse
from svd.curation.measuring.rows import of_clip
from svd.latents.windows import choose_windows
from svd.media.orientation import Orientation

LENGTHS = [40, 33, 47]
KINDS = {
    "closed groups": Kind(),
    "b-frames": Kind(b_frames=3),
    "b-pyramid, long groups": Kind(b_frames=5, gop=250, options={"x264-params": "b-pyramid=normal:b-adapt=0"}),
    "open groups": Kind(b_frames=3, options={"x264-params": "open-gop=1:scenecut=0"}),
    "no scene cuts": Kind(b_frames=2, gop=10, options={"x264-params": "scenecut=0"}),
    "hevc, open groups": Kind(codec="libx265", b_frames=3, options={"x265-params": "log-level=none:open-gop=1"}),
    "mpeg4": Kind(codec="mpeg4", b_frames=2, options={"qscale": "3"}),
    "mpeg2 program stream": Kind(suffix="mpg", codec="mpeg2video", b_frames=2),
    "transport stream": Kind(suffix="ts", b_frames=2),
    "matroska": Kind(suffix="mkv", b_frames=2),
    "vp9": Kind(suffix="webm", codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
    "avi": Kind(suffix="avi", codec="mpeg4"),
    "avi with b-frames": Kind(suffix="avi", b_frames=2),
    "elementary stream, no timestamps": Kind(suffix="h264", b_frames=2),
    "mjpeg": Kind(suffix="mov", codec="mjpeg", pixel_format="yuvj420p"),
    "10 bit": Kind(codec="libx265", pixel_format="yuv420p10le", options={"x265-params": "log-level=none"}),
    "4:4:4": Kind(pixel_format="yuv444p"),
    "with audio": Kind(audio=True),
}


def _accounted(analysis: SourceAnalysis) -> None:
    """Every frame is in one clip or in one dropped span."""
    spans = [(c.span.start_frame, c.span.end_frame) for c in analysis.clips]
    spans += [(d.start_frame, d.end_frame) for d in analysis.dropped]
    position = 0
    for start, end in sorted(spans):
        assert start == position and end > start
        position = end
    assert position == analysis.facts.frames


@pytest.mark.parametrize("name", KINDS)
def test_clips_decode_to_the_frames_of_their_rows(tmp_path: Path, name: str) -> None:
    """Copied clips: equal pixels; re-encoded ones: nearly equal; never a frame of another shot."""
    source = write(tmp_path / "source", list(shots(LENGTHS)), kind=KINDS[name])
    analysis = analyse(source, tiny_config())
    truth = decode_rgb(source)
    assert analysis.facts.frames == len(truth) == sum(LENGTHS)
    _accounted(analysis)
    assert [c.frame for c in analysis.cuts] == [40, 73]
    assert len(analysis.clips) >= 3
    for clip in analysis.clips:
        span = clip.span
        written = write_clip(source, span, analysis.facts, tmp_path / "clip.mp4")
        frames = decode_rgb(tmp_path / "clip.mp4")
        assert written.frames == span.frames == len(frames) == span.end_frame - span.start_frame
        assert written.bytes == (tmp_path / "clip.mp4").stat().st_size
        expected = truth[span.start_frame : span.end_frame]
        errors = [np.abs(a.astype(int) - b).mean() for a, b in zip(frames, expected, strict=True)]
        assert max(errors) == 0 if span.method == "copy" else max(errors) < 3
        assert not any(span.start_frame < c.frame < span.end_frame for c in analysis.cuts)


@pytest.mark.parametrize("name", ["closed groups", "open groups", "hevc, open groups", "transport stream"])
def test_most_frames_survive_copying(tmp_path: Path, name: str) -> None:
    """Ends are cut between packets, not at the keyframe before: little is lost."""
    source = write(tmp_path / "source", list(shots(LENGTHS)), kind=KINDS[name])
    clips = analyse(source, tiny_config()).clips
    assert all(c.span.method == "copy" for c in clips)
    assert sum(c.span.frames for c in clips) >= 0.75 * sum(LENGTHS)


def test_boundaries_never_cross_a_cut_and_snap_to_the_nearest_keyframe(tmp_path: Path) -> None:
    """Without scene-cut keyframes a clip starts at the first keyframe after its cut."""
    source = write(tmp_path / "source", list(shots(LENGTHS)), kind=KINDS["no scene cuts"])
    analysis = analyse(source, tiny_config())
    starts = [c.span.start_frame for c in analysis.clips]
    assert starts == [0, 40, 80]
    assert [d.reason for d in analysis.dropped if d.start_frame == 73] == ["shorter than 0.8 s"]


def test_the_papers_rule_ends_clips_at_keyframes_too(tmp_path: Path) -> None:
    """With clips.end "keyframe" the end moves back to the last keyframe that does not cross the cut."""
    source = write(tmp_path / "source", list(shots(LENGTHS)), kind=KINDS["no scene cuts"])
    analysis = analyse(source, tiny_config(clips__end="keyframe"))
    assert [(c.span.start_frame, c.span.end_frame) for c in analysis.clips] == [(0, 40), (40, 70), (80, 120)]
    _accounted(analysis)


def test_a_shot_without_keyframe_is_reencoded_or_dropped_by_policy(tmp_path: Path) -> None:
    """One keyframe in the whole file: the other shots have none."""
    kind = Kind(gop=1000, options={"x264-params": "scenecut=0:keyint=infinite"})
    source = write(tmp_path / "source", list(shots(LENGTHS)), kind=kind)
    exact = analyse(source, tiny_config())
    assert [c.span.method for c in exact.clips] == ["copy", "reencode", "reencode"]
    assert [(c.span.start_frame, c.span.end_frame) for c in exact.clips[1:]] == [(40, 73), (73, 120)]
    dropped = analyse(source, tiny_config(clips__no_keyframe="drop"))
    assert len(dropped.clips) == 1
    assert [d.reason for d in dropped.dropped] == ["no usable keyframe"] * 2


def test_long_shots_are_split_and_short_ones_dropped(tmp_path: Path) -> None:
    """No clip is longer than the maximum; a remainder that would be too short is shared between the last two."""
    source = write(tmp_path / "source", list(shots([12, 250], speed=0.4)))
    analysis = analyse(source, tiny_config(clips__max_seconds=4.0, clips__min_seconds=1.0))
    lengths = [c.span.end_seconds - c.span.start_seconds for c in analysis.clips]
    assert len(lengths) == 3 and all(1.0 <= s <= 4.0 for s in lengths)
    assert sum(c.span.frames for c in analysis.clips) == 250
    assert [d.reason for d in analysis.dropped] == ["shorter than 1 s"]
    assert [c.span.start_cut for c in analysis.clips] == [0, None, None]
    exact = analyse(source, tiny_config(clips__max_seconds=4.0, clips__min_seconds=1.0, cuts__min_scene_seconds=0.1))
    assert [c.span for c in exact.clips] == [c.span for c in analysis.clips]


def test_rotated_sources_give_upright_samples_and_clips(tmp_path: Path) -> None:
    """A display matrix survives copying, is applied in re-encoding, and samples are upright."""
    frames = list(shots([40, 40]))
    upright = [np.ascontiguousarray(np.rot90(f)) for f in frames]
    turned = write(tmp_path / "turned", frames, kind=Kind(rotation=90, gop=1000, options={"x264-params": "scenecut=0"}))
    analysis = analyse(turned, tiny_config())
    facts = analysis.facts
    assert (facts.orientation, facts.display_width, facts.display_height) == (Orientation(270), 96, 128)
    assert analysis.clips[0].frames.shape == (3, 128, 96, 3)
    assert np.abs(analysis.clips[0].frames[0].astype(int) - upright[0]).mean() < 6
    assert [c.span.method for c in analysis.clips] == ["copy", "reencode"]
    copied, encoded = write_clips(
        turned, facts, [(c.span, tmp_path / f"{i}.mp4") for i, c in enumerate(analysis.clips)]
    )
    assert {(clip.width, clip.height) for clip in (copied, encoded)} == {(96, 128)}, "both as players show them"
    assert (copied.rotation, encoded.rotation) == (270, 0)
    with av.open(str(tmp_path / "0.mp4")) as container:
        assert next(container.decode(video=0)).rotation == 90
    picture = decode_rgb(tmp_path / "1.mp4")[0]
    assert picture.shape == (128, 96, 3)
    assert np.abs(picture.astype(int) - upright[40]).mean() < 6


def test_variable_frame_rate_keeps_the_times_of_frames(tmp_path: Path) -> None:
    """Every third frame is held three times as long; clips keep the distances."""
    pts = list(np.cumsum([1, 1, 3] * 40) - 1)
    frames = list(shots([60, 60]))
    kind = Kind(pts=[int(p) for p in pts], gop=1000, options={"x264-params": "scenecut=0"})
    source = write(tmp_path / "vfr", frames, kind=kind)
    analysis = analyse(source, tiny_config())
    assert analysis.facts.variable_frame_rate
    assert analysis.facts.fps == pytest.approx(24 * 120 / 200, rel=0.02)
    for clip in analysis.clips:
        write_clip(source, clip.span, analysis.facts, tmp_path / "clip.mp4")
        with av.open(str(tmp_path / "clip.mp4")) as container:
            times = [float(f.time) for f in container.decode(video=0)]
        expected = np.array(pts[clip.span.start_frame : clip.span.end_frame]) / 24
        assert times == pytest.approx(list(expected - expected[0]), abs=1e-3)


def test_a_clip_has_its_own_rate(tmp_path: Path) -> None:
    """One shot at 24 frames a second and one at 12: a row says that of its clip, and training is told it."""
    pts = [*range(48), *(48 + 2 * i for i in range(36))]
    source = write(tmp_path / "two", list(shots([48, 36])), kind=Kind(pts=pts))
    analysis = analyse(source, tiny_config())
    assert analysis.facts.variable_frame_rate and 12.5 < analysis.facts.fps < 20
    found = [_row(clip, source, analysis, tmp_path / "clip.mp4") for clip in analysis.clips]
    assert [row["fps"] for row in found] == pytest.approx([24, 12], rel=1e-3)
    assert [row["variable_rate"] for row in found] == [False, False]
    windows = [choose_windows("a", row["frames"], row["fps"], 8, (6.0, 6.0), 1)[0] for row in found]
    assert [(w.stride, w.fps) for w in windows] == [(4, pytest.approx(6, rel=1e-3)), (2, pytest.approx(6, rel=1e-3))]
    uneven = write(tmp_path / "uneven", list(shots([48])), kind=Kind(pts=[int(p) for p in np.cumsum([1, 1, 3] * 16)]))
    analysis = analyse(uneven, tiny_config())
    row = _row(analysis.clips[0], uneven, analysis, tmp_path / "clip.mp4")
    assert row["variable_rate"] and row["fps"] == pytest.approx(24 * 3 / 5, rel=0.03)


def _row(clip: ClipAnalysis, source: Path, analysis: SourceAnalysis, target: Path) -> dict[str, object]:
    scored = replace(clip, scores=dict.fromkeys(axis.name for axis in axes_computed("measured")))
    return of_clip(scored, write_clip(source, clip.span, analysis.facts, target), analysis)


def test_rows_say_how_a_clip_is_coded(tmp_path: Path) -> None:
    """Of a copied clip what the source is like, of a re-encoded one that it is ordinary."""
    flags = {"flags": "+ildct+ilme", "top": "1"}
    kind = Kind(suffix="mpg", codec="mpeg2video", options=flags, aspect=Fraction(32, 27), colours=(6, 6, 6, 1))
    source = write(tmp_path / "source", list(shots([40], height=64, width=96)), kind=kind)
    analysis = analyse(source, tiny_config())
    (copied,) = analysis.clips
    names = ("method", "width", "height", "pixel_format", "transfer", "sample_aspect", "rotation", "interlaced")
    rows = [
        _row(replace(copied, span=replace(copied.span, method=method)), source, analysis, tmp_path / "clip.mp4")
        for method in ("copy", "reencode")
    ]
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("copy", 114, 64, "yuv420p", "smpte170m", "32/27", 0, True),
        ("reencode", 114, 64, "yuv420p", "smpte170m", "1", 0, False),
    ]
    assert set(rows[0]) <= set(MEASURED_SCHEMA.names)


def test_non_square_pixels_are_shown_square(tmp_path: Path) -> None:
    """Samples and re-encoded clips have square pixels; a copied clip keeps the aspect."""
    source = write(tmp_path / "anamorphic", list(shots([40])), kind=Kind(aspect=Fraction(4, 3)))
    analysis = analyse(source, tiny_config())
    assert (analysis.facts.display_width, analysis.facts.display_height) == (170, 96)
    assert analysis.clips[0].frames.shape[1:3] == (96, 170)
    write_clip(source, analysis.clips[0].span, analysis.facts, tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
    span = replace(analysis.clips[0].span, method="reencode")
    written = write_clip(source, span, analysis.facts, tmp_path / "square.mp4")
    assert (written.width, written.height, written.frames) == (170, 96, 40)
    with av.open(str(tmp_path / "square.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (170, 96) and (stream.sample_aspect_ratio or 1) == 1


def test_interlaced_sources_are_noticed_and_deinterlaced_when_reencoded(tmp_path: Path) -> None:
    """Combing of moving edges disappears in re-encoded clips, and no frame does."""
    frames = list(shots([80], speed=6.0))
    woven = [
        np.where((np.arange(96) % 2 == 0)[:, None, None], a, b) for a, b in zip(frames[::2], frames[1::2], strict=True)
    ]
    kind = Kind(suffix="mpg", codec="mpeg2video", gop=1000, options={"flags": "+ildct+ilme", "top": "1", "qscale": "2"})
    source = write(tmp_path / "woven", woven, kind=kind)
    analysis = analyse(source, tiny_config())
    assert analysis.facts.interlaced
    span = replace(analysis.clips[0].span, method="reencode")
    assert write_clip(source, span, analysis.facts, tmp_path / "clip.mp4").frames == 40
    pictures = woven[20], decode_rgb(tmp_path / "clip.mp4")[20]
    combing = [np.abs(np.diff(p.astype(int), n=2, axis=0)).mean() for p in pictures]
    assert combing[1] < 0.5 * combing[0]


def test_most_of_the_early_frames_tell_whether_a_source_is_interlaced(tmp_path: Path) -> None:
    """A progressive first frame, as at a studio's logo, hides nothing; a single interlaced frame makes nothing so."""
    for flags, expected in (([False] + [True] * 20, True), ([True] + [False] * 20, False)):
        decoder = decode.FrameDecoder(tmp_path / "unused")
        decoder._size = (96, 128)
        for flag in flags:
            decoder._decoded(None, SimpleNamespace(interlaced_frame=flag, pts=0, key_frame=0), None)
        assert decoder.facts.interlaced is expected


def test_an_edit_list_hides_frames(tmp_path: Path) -> None:
    """Frames that the edit list leaves out are in no clip: decoding the file shows the same frames as the analysis."""
    source = write(tmp_path / "plain", list(shots([90])), kind=Kind(gop=24, b_frames=2))
    edited = tmp_path / "edited.mp4"
    with av.open(str(source)) as old, av.open(str(edited), "w") as new:
        stream = old.streams.video[0]
        track = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is None:
                continue
            packet.pts, packet.dts = packet.pts - 10 * 512, packet.dts - 10 * 512
            packet.stream = track
            new.mux(packet)
    shown = decode_rgb(edited)
    analysis = analyse(edited, tiny_config())
    assert analysis.facts.frames == len(shown)
    for clip in analysis.clips:
        write_clip(edited, clip.span, analysis.facts, tmp_path / "clip.mp4")
        expected = shown[clip.span.start_frame : clip.span.end_frame]
        frames = decode_rgb(tmp_path / "clip.mp4")
        assert len(frames) == len(expected) == clip.span.frames
        assert all(np.abs(a.astype(int) - b).mean() < 3 for a, b in zip(frames, expected, strict=True))


def test_timestamps_that_run_backwards_are_rebuilt(tmp_path: Path) -> None:
    """Two recordings glued together in one stream: frames are counted, clips re-encoded, and the row says so."""
    parts = [write(tmp_path / f"part{i}", list(shots([36], seed=i)), kind=Kind(suffix="ts")) for i in range(2)]
    glued = tmp_path / "glued.ts"
    glued.write_bytes(b"".join(p.read_bytes() for p in parts))
    analysis = analyse(glued, tiny_config())
    assert any("timestamps" in w for w in analysis.facts.warnings)
    assert analysis.facts.frames == 72 and [c.frame for c in analysis.cuts] == [36]
    truth = decode_rgb(glued)
    for clip in analysis.clips:
        assert clip.span.method == "reencode"
        write_clip(glued, clip.span, analysis.facts, tmp_path / "clip.mp4")
        frames = decode_rgb(tmp_path / "clip.mp4")
        expected = truth[clip.span.start_frame : clip.span.end_frame]
        assert len(frames) == clip.span.frames
        assert all(np.abs(a.astype(int) - b).mean() < 3 for a, b in zip(frames, expected, strict=True))


def test_files_are_equal_byte_for_byte(tmp_path: Path) -> None:
    """Writing twice gives equal bytes, copied or re-encoded."""
    kind = Kind(gop=1000, b_frames=2, options={"x264-params": "scenecut=0"})
    source = write(tmp_path / "source", list(shots([40, 40])), kind=kind)
    analysis = analyse(source, tiny_config())
    for name in ("one", "two"):
        write_clips(
            source, analysis.facts, [(c.span, tmp_path / f"{name}{i}.mp4") for i, c in enumerate(analysis.clips)]
        )
    for i in range(len(analysis.clips)):
        assert (tmp_path / f"one{i}.mp4").read_bytes() == (tmp_path / f"two{i}.mp4").read_bytes()


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    """A clip with other frames than its row says is an error, and nothing is left behind."""
    source = write(tmp_path / "source", list(shots([60])))
    analysis = analyse(source, tiny_config())
    write(tmp_path / "source", list(shots([30])))
    with pytest.raises(SourceFailure, match="instead of 60"):
        write_clip(source, analysis.clips[0].span, analysis.facts, tmp_path / "clip.mp4")
    assert not list(tmp_path.glob("*clip*"))
