"""Hostile and broken inputs: each becomes an analysis or a failure with a readable reason, and nothing else happens."""

from __future__ import annotations

import os
import random
import tarfile
import threading
from pathlib import Path

import polars as pl
import pytest
from hostile_files import GIANT_RAW, RATELESS_RAW, lies, mutants, write_originals
from media_files import Kind, shots, tiny_config, write

from svd.config import CurationConfig
from svd.curation.base.types import SourceAnalysis, SourceFailure
from svd.curation.clips.writer import write_clips
from svd.curation.measuring.process import DecodeProcess, analyse_guarded
from svd.curation.measuring.unit import identify, measure_unit, units_of
from svd.sources.listing import list_sources

LIMITS = {"timeout": 30.0, "memory": 1 << 30}


@pytest.fixture(scope="module")
def config() -> CurationConfig:
    return tiny_config()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("good") / "good", list(shots([30, 30])), kind=Kind(b_frames=2, audio=True))


@pytest.fixture(scope="module")
def decoding() -> DecodeProcess:
    with DecodeProcess(**LIMITS) as decoding:
        yield decoding


def _reason(decoding: DecodeProcess, path: Path, config: CurationConfig) -> str:
    with pytest.raises(SourceFailure) as failure:
        decoding.analyse(path, config)
    reason = failure.value.reason
    assert reason and "\n" not in reason and "Traceback" not in reason
    return reason


def test_bad_files_have_readable_reasons(
    decoding: DecodeProcess, good: Path, config: CurationConfig, tmp_path: Path
) -> None:
    """Text, nothing, noise, sound only, a picture, a folder, a pipe, a missing file, a playlist."""
    data = good.read_bytes()
    files = {
        "text.mp4": (b"this is not a video\n" * 50, "not a"),
        "empty.mp4": (b"", "empty"),
        "noise.mp4": (random.Random(0).randbytes(20000), "not a"),
        "half.mp4": (data[: len(data) // 2], "not a readable video"),
        "header only.mp4": (data[:40], "not a readable video"),
        "list.m3u8": (b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n/etc/passwd\n#EXT-X-ENDLIST\n", "not a"),
        "concat.mp4": (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a"),
    }
    for name, (content, words) in files.items():
        (tmp_path / name).write_bytes(content)
        assert words in _reason(decoding, tmp_path / name, config), name
    single = write(tmp_path / "single", list(shots([1])))
    assert "frame" in _reason(decoding, single, config)
    (tmp_path / "folder.mp4").mkdir()
    assert "regular" in _reason(decoding, tmp_path / "folder.mp4", config)
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "regular" in _reason(decoding, tmp_path / "pipe.mp4", config)
    assert "read" in _reason(decoding, tmp_path / "missing.mp4", config)
    assert "regular" in _reason(decoding, Path("/dev/zero"), config)


def test_sound_without_pictures(decoding: DecodeProcess, config: CurationConfig, tmp_path: Path) -> None:
    """An audio file with a video's name."""
    import wave

    path = tmp_path / "sound.mp4"
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(b"\0\0" * 8000)
    assert _reason(decoding, path, config) == "no video stream"


@pytest.mark.parametrize(
    "name", ["a b.mp4", "quo'te\".mp4", "ünïcödé-🎬.mp4", "pipe:0.mp4", "%03d.mp4", "-i.mp4", "a;rm.mp4"]
)
def test_any_file_name_works(
    decoding: DecodeProcess, good: Path, config: CurationConfig, tmp_path: Path, name: str
) -> None:
    """Names are never patterns, protocols or options."""
    (tmp_path / name).write_bytes(good.read_bytes())
    assert decoding.analyse(tmp_path / name, config).facts.frames == 60


def test_lies_in_the_header(decoding: DecodeProcess, good: Path, config: CurationConfig, tmp_path: Path) -> None:
    """65535 × 65535 pixels, 10^9 frames and a rate of zero in the boxes of an MP4 file."""
    for name, content in lies(good.read_bytes()).items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        try:
            assert decoding.analyse(path, config).facts.frames <= 60
        except SourceFailure as failure:
            assert failure.reason
    assert decoding.analyse(good, config).facts.frames == 60


def test_real_giants_are_refused(decoding: DecodeProcess, config: CurationConfig, tmp_path: Path) -> None:
    """A raw stream whose own header asks for more pixels than any video has."""
    (tmp_path / "giant.y4m").write_bytes(GIANT_RAW)
    assert _reason(decoding, tmp_path / "giant.y4m", config)
    (tmp_path / "zero.y4m").write_bytes(RATELESS_RAW)
    try:
        assert decoding.analyse(tmp_path / "zero.y4m", config).facts.fps > 0
    except SourceFailure as failure:
        assert failure.reason


def test_a_hang_becomes_a_reason_and_the_next_source_works(good: Path, config: CurationConfig, tmp_path: Path) -> None:
    """A source that takes too long is given up; its process goes, a new one takes over."""
    long = write(tmp_path / "long", list(shots([1500], height=144, width=256, speed=0.2)))
    with DecodeProcess(timeout=60, memory=1 << 30) as decoding:
        decoding.analyse(good, config)
        decoding.timeout = 0.02
        assert "not finished after" in _reason(decoding, long, config)
        decoding.timeout = 60
        assert isinstance(decoding.analyse(good, config), SourceAnalysis)


def test_a_crash_and_a_lack_of_memory_become_reasons(good: Path, config: CurationConfig) -> None:
    """The decoder's process dies; the run does not."""
    with DecodeProcess(timeout=60, memory=1 << 30) as decoding:
        decoding.analyse(good, config)
        child = decoding._process
        assert child is not None
        threading.Timer(0.0, os.kill, (child.pid, 11)).start()
        child.join(20)
        assert decoding.analyse(good, config).facts.frames == 60
    with pytest.raises(SourceFailure, match=r"memory|crashed"):
        analyse_guarded(good, config, timeout=60, memory=1 << 20)


def test_names_that_lead_out_of_the_folder(good: Path, config: CurationConfig, tmp_path: Path) -> None:
    """`../` in a list and in a tar: the sources are read or refused, and nothing is written outside the unit."""
    inside = tmp_path / "work" / "deep"
    inside.mkdir(parents=True)
    (inside / "list.csv").write_text(f"uri\n../../stolen.mp4\n{os.path.relpath(good, inside)}\n")
    with tarfile.open(inside / "shard.tar", "w") as tar:
        for name in ("../../outside.mp4", f"{tmp_path}/absolute.mp4"):
            info = tarfile.TarInfo(name)
            info.size = good.stat().st_size
            with good.open("rb") as stream:
                tar.addfile(info, stream)
    sources = list_sources([str(inside / "list.csv"), str(inside / "shard.tar")])
    (unit,) = units_of([identify(source) for source in sources], 9)
    before = sorted(p for p in tmp_path.rglob("*"))
    with DecodeProcess(**LIMITS) as decoding:
        measure_unit(unit, config, inside / "measured", decoding)
    written = [p for p in tmp_path.rglob("*") if p not in before]
    assert written and all(p.is_relative_to(inside / "measured") for p in written)
    rows = pl.read_parquet(inside / "measured" / unit.name / "sources.parquet")
    verdicts = dict(zip(rows["source_uri"], rows["verdict"], strict=True))
    assert verdicts.pop("../../stolen.mp4") == "failed"
    assert sorted(verdicts.values()) == ["duplicate", "duplicate", "ok"]


def test_clips_are_written_behind_the_same_guard(good: Path, config: CurationConfig, tmp_path: Path) -> None:
    """Equal files to those written directly; a failure has a reason and leaves nothing behind."""
    with DecodeProcess(**LIMITS) as decoding:
        analysis = decoding.analyse(good, config)
        targets = [tmp_path / f"{i}.mp4" for i in range(len(analysis.clips))]
        jobs = [(c.span, t) for c, t in zip(analysis.clips, targets, strict=True)]
        written = decoding.write_clips(good, analysis.facts, jobs)
        contents = [t.read_bytes() for t in targets]
        assert written == write_clips(good, analysis.facts, jobs) and contents == [t.read_bytes() for t in targets]
        with pytest.raises(SourceFailure, match="read"):
            decoding.write_clips(tmp_path / "gone.mp4", analysis.facts, [(analysis.clips[0].span, tmp_path / "x.mp4")])
        decoding.timeout = 0.0
        with pytest.raises(SourceFailure, match="not finished"):
            decoding.write_clips(good, analysis.facts, [(analysis.clips[0].span, tmp_path / "x.mp4")])
    assert sorted(tmp_path.iterdir()) == targets


def test_mutated_files(decoding: DecodeProcess, config: CurationConfig, tmp_path: Path) -> None:
    """Forty mutations of five containers: each is analysed or fails with a reason. Whole runs: test_hostile_run.py."""
    originals = write_originals(tmp_path)
    before = sorted(tmp_path.iterdir())
    good = bad = 0
    for i, data in enumerate(mutants(originals, 40, seed=1)):
        path = tmp_path / f"mutated{originals[i % len(originals)].suffix}"
        path.write_bytes(data)
        try:
            analysis = decoding.analyse(path, config)
            assert analysis.facts.frames >= 2 and analysis.facts.duration > 0
            good += 1
        except SourceFailure as failure:
            assert failure.reason and "\n" not in failure.reason
            bad += 1
        path.unlink()
    assert sorted(tmp_path.iterdir()) == before
    assert good + bad == 40 and good and bad
