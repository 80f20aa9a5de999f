"""Inputs of the curation stage for tests: small synthetic sources, an untrained toy CLIP, and files that are broken."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import av
import numpy as np
import torch

from svd.config import Preset, SyntheticWorlds
from svd.config.load import load_preset
from svd.model.formats import clip
from svd.stage import StageContext
from svd.synthetic.videos import write_worlds

TINY = str(Path(__file__).resolve().parents[2] / "presets" / "tiny.yaml")  # also for tests that run elsewhere

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


def tiny(**overrides) -> Preset:
    """The tiny preset with few sources a unit, so that a handful of sources makes several units."""
    values = {"sources.sources_per_shard": 5, "curation.filters.min_motion": {"quantile": 0.25}}
    values |= {"curation.motion.fps": 2}
    return load_preset(TINY, values | {name.replace("__", "."): value for name, value in overrides.items()})


def write_sources(folder: Path, train: int = 2, test: int = 1, scenes: int = 4) -> Path:
    """Synthetic sources in the layout of the stage `sources`."""
    config = SyntheticWorlds(train_videos=train, test_videos=test, scenes_per_video=scenes, height=64, width=96, fps=24)
    write_worlds(folder, config, 0)
    return folder


def write_encoders(folder: Path) -> Path:
    """An untrained toy CLIP: every score is there, and means nothing."""
    preset = load_preset(TINY)
    config = clip.toy_config(preset.encoders.toy_width, preset.model.unet.cross_attention_dim)
    torch.manual_seed(0)
    clip.save_toy(clip.build_clip(config, "toy"), config, folder)
    return folder


def write_broken(folder: Path, good: Path) -> dict[str, str]:
    """Files of the kinds that real collections hold; name → what their row must say ("" for a usable one)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    (folder / "empty.mp4").write_bytes(b"")
    data = good.read_bytes()
    (folder / "truncated.mp4").write_bytes(data[: len(data) // 3])
    write_audio(folder / "audio only.m4v")
    write_video(folder / "one frame.mp4", frames=1)
    shutil.copy(good, folder / 'it\'s "quoted" žluťoučký.mp4')
    (folder / "nothing here").mkdir()
    (folder / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"a name that is no Unicode")
    (folder / "dangling.mp4").symlink_to(folder / "missing.mp4")
    return {
        "text.mp4": "failed",
        "empty.mp4": "failed",
        "truncated.mp4": "failed",
        "audio only.m4v": "failed",
        "one frame.mp4": "no-clips|failed",
        'it\'s "quoted" žluťoučký.mp4': "duplicate|ok",
        "dangling.mp4": "failed",
        "caf\\udce9.mp4": "failed",
    }


def write_video(path: Path, frames: int, height: int = 64, width: int = 96, fps: int = 24) -> None:
    """A short H.264 video of moving stripes."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "30", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            row = ((np.arange(width) + 3 * index) % 32 * 8).astype(np.uint8)
            picture = np.broadcast_to(row[None, :, None], (height, width, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


def write_audio(path: Path) -> None:
    """A file with a tone and no picture."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        tone = (0.1 * np.sin(np.arange(44100) / 20)).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def context(preset: Preset, sources: Path, encoders: Path, folder: Path) -> StageContext:
    """Where a run of the stage reads and writes."""
    return StageContext(preset, {"sources": sources, "encoders": encoders}, folder / "output", folder / "work")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
