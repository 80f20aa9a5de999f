"""A random text-to-video model and a small data set in UCF-101's layout, for tests of the evaluation's plumbing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from svd.config.load import load_preset
from svd.core.files import write_json
from svd.media.video import write_mp4
from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.formats import clip as clips
from svd.model.formats.folders import save_autoencoder, save_unet
from svd.model.unet import UNet, UNetConfig
from svd.stage import StageContext
from svd.synthetic.scenes import World, render_clip

TINY = str(Path(__file__).resolve().parents[2] / "presets" / "tiny.yaml")  # also for tests that run elsewhere

WIDTH = 32
CLASSES = ("BlueRingGrowing", "GreenDiscBouncing", "RedStarSpinning", "TealCubeSwinging")
OVERRIDES: dict[str, Any] = {
    "encoders.toy_width": WIDTH,
    "evaluation.ucf101.samples": 10,
    "evaluation.ucf101.frames": 4,
    "evaluation.ucf101.height": 16,
    "evaluation.ucf101.width": 24,
    "evaluation.ucf101.resized": [16, 24],
    "evaluation.ucf101.cropped": [16, 22],
    "compute.evaluation.ucf101.batch_size": 6,
    "evaluation.ucf101.shown": 2,
    "evaluation.ucf101.sampling.steps": 1,
}


def write_dataset(folder: Path, per_class: int = 3) -> Path:
    """A data set of 4 classes in UCF-101's layout."""
    world = World(0, "test")
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for clip in range(per_class):
            frames = render_clip(world, 10 * number + clip, 16, 24, 32, 25).frames
            write_mp4(folder / name / f"v_{name}_g{clip + 1:02d}_c01.avi", frames, 25)
    lists = folder / "ucfTrainTestlist"
    lists.mkdir()
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.avi"))
    (lists / "trainlist01.txt").write_text("".join(f"{file} 1\n" for file in files[1::2]))
    (lists / "testlist01.txt").write_text("".join(f"{file}\n" for file in files[::2]))
    write_json(folder / "prompts.json", {"prompts": {name: f"a {name.lower()}" for name in CLASSES}})
    return folder


def write_models(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Random U-Net, autoencoder and toy encoders; returns the stages' folders."""
    torch.manual_seed(seed)
    unet = UNet(
        UNetConfig(
            block_out_channels=(32, 32), attention_levels=(True, False), layers_per_block=1, head_channels=16,
            cross_attention_dim=WIDTH, id_embedding_dim=8, ids=2,
        )
    )  # fmt: skip
    save_unet(unet, folder / "hq" / "unet")
    autoencoder = Autoencoder(
        AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=1.0)
    )
    save_autoencoder(autoencoder, folder / "autoencoder")
    config = clips.toy_config(WIDTH, WIDTH)
    clips.save_toy(clips.build_clip(config, "test"), config, folder / "encoders")
    return {
        "high-quality-finetuning": folder / "hq",
        "autoencoder": folder / "autoencoder",
        "encoders": folder / "encoders",
    }


def _path(key: str) -> str:
    return f"compute.evaluation.ucf101.{key}" if key == "batch_size" else f"evaluation.ucf101.{key}"


def make_context(folder: Path, output: str = "output", **overrides: Any) -> StageContext:
    """A stage context over models and data set in `folder`, made on the first call."""
    if not (folder / "sources").exists():
        write_dataset(folder / "sources" / "ucf101_fixture")
        write_models(folder)
    names = {
        "high-quality-finetuning": "hq",
        "autoencoder": "autoencoder",
        "encoders": "encoders",
        "sources": "sources",
    }
    preset = load_preset(TINY, {**OVERRIDES, **{_path(k): v for k, v in overrides.items()}})
    work = folder / "work" / output
    work.mkdir(parents=True, exist_ok=True)
    return StageContext(preset, {k: folder / v for k, v in names.items()}, folder / output, work)
