"""A training set-up small enough for tests: a toy preset, random clips with structure, an untrained autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from svd.config import Preset, TrainingCompute
from svd.config.load import load_preset
from svd.latents.cache import digest, write_index, write_shard
from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.formats.folders import checkpoint_hash, save_autoencoder
from svd.stage import StageContext

TINY = str(Path(__file__).resolve().parents[2] / "presets" / "tiny.yaml")  # also for tests that run elsewhere

FRAMES, SIZE, WIDTH, TOKENS = 4, 16, 16, 5
CAMERAS = ("static", "pan-left", "zoom-in", "pan-right")
PHASE = {
    "iterations": 6,
    "batch_size": 4,
    "height": SIZE,
    "width": SIZE,
    "frames": FRAMES,
    "p_mean": 0.0,
    "p_std": 1.0,
    "learning_rate": 1e-3,
}
STAGES = (
    "image_pretraining",
    "video_pretraining",
    "high_quality_finetuning",
    "image_to_video",
    "camera_lora",
    "frame_interpolation",
)


def toy_preset(size: int = SIZE, **training: Any) -> Preset:
    """The tiny preset at toy size, with clips of size x size pixels.

    `training` overrides keys of every training stage or of `compute.training`.
    """
    overrides: dict[str, Any] = {
        "model.unet": {
            "block_out_channels": [32, 32],
            "attention_levels": [True, False],
            "layers_per_block": 1,
            "head_channels": 16,
            "cross_attention_dim": WIDTH,
            "id_embedding_dim": 8,
        },
        "model.autoencoder.latent_channels": 4,
        "model.autoencoder.block_out_channels": [32, 32],  # as in `write_toy_autoencoder`
        "latents.geometries": [{"frames": FRAMES, "height": size, "width": size}],
        "latents.min_fps": 4,
        "latents.max_fps": 12,
    }
    compute = {"validate_every": 3, "checkpoint_every": 2, "sample_steps": 2}
    compute |= {key: training.pop(key) for key in TrainingCompute.model_fields.keys() & training.keys()}
    overrides |= {f"compute.training.{key}": value for key, value in compute.items()}
    for stage in STAGES:
        frames = {"image_pretraining": 1, "frame_interpolation": FRAMES}.get(stage, FRAMES)
        values = {
            "phases": [{**PHASE, "frames": frames, "height": size, "width": size}],
            "subset": {},
            "validation_samples": 8,
            **training,
        }
        if stage == "camera_lora":
            values["phases"] = values["phases"][:1]
        overrides |= {f"{stage}.{key}": value for key, value in values.items()}
    return load_preset(TINY, overrides)


def write_cache(folder: Path, autoencoder: Path | None = None, clips: int = 12, orbit: bool = False) -> Path:
    """A latent cache of random clips whose latents follow their first caption, a quarter of them for testing.

    autoencoder: the one that is said to have made it.
    """
    draw = torch.Generator().manual_seed(0)
    size = SIZE // 2
    texts = torch.randn(4, TOKENS, WIDTH, generator=draw)
    pattern = torch.randn(4, 1, 4, size, size, generator=draw)
    which = torch.arange(clips) % 4
    mean = pattern[which].expand(-1, FRAMES, -1, -1, -1) + 0.1 * torch.randn(
        clips, FRAMES, 4, size, size, generator=draw
    )
    tensors = {
        "moments": torch.cat([mean, torch.full_like(mean, -6)], dim=2).bfloat16(),
        "image": torch.randn(clips, FRAMES, WIDTH, generator=draw).half(),
        "frame": torch.randint(0, 256, (clips, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8),
        "text": texts.half(),
    }
    write_shard(folder / "shards" / "toy.safetensors", tensors)
    rows = [_row(k, orbit) for k in range(clips)]
    facts = {"weights": "toy", "scaling_factor": 0.5, "samples": clips}
    facts |= {"autoencoder": checkpoint_hash(autoencoder)} if autoencoder else {}
    write_index(folder, rows, facts, torch.zeros(TOKENS, WIDTH))
    return folder


def _row(number: int, orbit: bool) -> dict[str, Any]:
    captions = [
        {"captioner": "sidecar", "text": f"caption {number % 4}", "row": number % 4},
        {"captioner": "motion", "text": "moving", "row": (number + 1) % 4},
    ]
    return {
        "sample_id": digest("toy", number),
        "clip_id": f"clip-{number}",
        "geometry": f"{FRAMES}x{SIZE}x{SIZE}",
        "split": "test" if number % 5 == 1 else "train",
        "fps": 6.0 + number % 3,
        "motion_bucket": 20 * number,
        "motion_score": float(number),
        "similarity": number / 10,
        "text_area": 0.01 * number,
        "camera": CAMERAS[number % 4],
        "elevation": 10.0 if orbit else 0.0,
        "shard": "toy.safetensors",
        "row": number,
        "captions": captions,
    }


def write_toy_autoencoder(folder: Path) -> Path:
    """An untrained autoencoder that halves each side."""
    torch.manual_seed(0)
    config = AutoencoderConfig(block_out_channels=(32, 32), layers_per_block=1, scaling_factor=0.5)
    save_autoencoder(Autoencoder(config), folder)
    return folder


def toy_context(folder: Path, stage: str, preset: Preset | None = None, **inputs: Path) -> StageContext:
    """A context whose latents and autoencoder are made on first use in `folder`; `inputs` with _ for -."""
    if not (folder / "latents").exists():
        write_cache(folder / "latents", write_toy_autoencoder(folder / "autoencoder"))
    given = {"latents": folder / "latents", "autoencoder": folder / "autoencoder"}
    given |= {name.replace("_", "-"): path for name, path in inputs.items()}
    work = folder / "work" / stage
    work.mkdir(parents=True, exist_ok=True)
    return StageContext(preset or toy_preset(), given, folder / "outputs" / stage, work)
