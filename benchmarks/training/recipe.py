"""An image-to-video training step beside the recipe of SVD_Xtend, an open trainer of SVD, on the CPU.

    python -m benchmarks.training.recipe [--repeats 5] [--batch 1]

Theirs (pixeli99/SVD_Xtend, train_svd.py of 2024-07): diffusers' U-Net, every frame and the conditioning frame encoded
by diffusers' VAE in every step, the image's embedding by transformers' CLIP in every step, AdamW, EMA. Ours: latents
and embeddings from a cache on disk through the loader, the conditioning frame alone encoded live, clipping, AdamW, EMA.
Making the cache, once, is not counted.

All networks have about a fifth of SVD's width (U-Net 64-128-256-256 with 69 M parameters, VAE 32-64-96-96, CLIP
256 x 32), the clips 14 frames of 128 x 192. The two U-Nets have equal weights; the same parameters train: all, or as
SVD_Xtend does, the temporal transformer blocks alone. One thread, CPU seconds, in turns. Demanded: 1.8 times their
samples a second.
Then the loader alone: the share of a step that a process without workers waits for its batch (demanded: 3 %).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from svd.config.load import load_preset
from svd.latents.batches import Buckets, IndexedLoader
from svd.latents.cache import LatentCache, write_index, write_shard
from svd.latents.loader import Batch, Draws, Examples
from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.unet import UNet, UNetConfig
from svd.tasks.image_to_video import IMAGE_TO_VIDEO
from svd.training.module import Diffusion, make_optimizer

FRAMES, HEIGHT, WIDTH, CONTEXT, CLIPS = 14, 128, 192, 256, 8
UNET_WIDTHS, VAE_WIDTHS = (64, 128, 256, 256), (32, 64, 96, 96)
GOAL, WAITING = 1.8, 0.03


def trains(part: str, name: str) -> bool:
    """Return whether a parameter of either U-Net trains; their names are alike."""
    return part == "all" or "temporal_transformer_block" in name


class Theirs:
    """A step of SVD_Xtend's recipe on clips (B, T, 3, H, W) in [-1, 1]."""

    def __init__(self, unet: Any, part: str) -> None:
        self.unet = unet
        self.vae: Any = AutoencoderKLTemporalDecoder(
            block_out_channels=VAE_WIDTHS, down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2
        ).requires_grad_(False)
        config = CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=32, num_attention_heads=4, patch_size=14,
            projection_dim=CONTEXT,
        )  # fmt: skip
        self.clip: Any = CLIPVisionModelWithProjection(config).requires_grad_(False)
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(trains(part, name))
        self.trained = [p for p in unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        self.ema = EMAModel(unet.parameters())

    def latents(self, frames: Tensor) -> Tensor:
        """Encode every frame: (B, T, C, h, w), scaled."""
        moments = self.vae.encode(frames.flatten(0, 1)).latent_dist.sample()
        return moments.unflatten(0, frames.shape[:2]) * self.vae.config.scaling_factor

    @torch.no_grad()
    def observe(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return latents, conditioning latents (B, C, h, w), embeddings (B, 1, D) and the noise levels of both (B,)."""
        latents = self.latents(clips)
        sigma = (torch.randn(len(clips)) * 0.5 - 3).exp()
        first = clips[:, :1]
        noisy = first + torch.randn_like(first) * sigma[:, None, None, None, None]
        condition = self.latents(noisy)[:, 0] / self.vae.config.scaling_factor
        image = nn.functional.interpolate(clips[:, 0], (224, 224), mode="bicubic", antialias=True)
        return latents, condition, self.clip(image).image_embeds[:, None], sigma

    def step(self, clips: Tensor) -> Tensor:
        """Take one step and return the loss."""
        latents, condition, embeddings, augmentation = self.observe(clips)
        noise, sigma = torch.randn_like(latents), (torch.randn(len(clips)) * 1.6 + 0.7).exp()[:, None, None, None, None]
        noisy = latents + noise * sigma
        given = torch.cat([noisy / (sigma**2 + 1) ** 0.5, condition[:, None].expand_as(latents)], 2)
        ids = torch.tensor([[7.0, 127.0, float(augmentation[0])]]).expand(len(clips), -1)
        predicted = self.unet(given, 0.25 * sigma.flatten().log(), embeddings, added_time_ids=ids).sample
        denoised = predicted * -sigma / (sigma**2 + 1) ** 0.5 + noisy / (sigma**2 + 1)
        loss = ((1 + sigma**2) * sigma**-2 * (denoised - latents) ** 2).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        return loss.detach()


class Ours:
    """A step of the platform: its module, its loader, its clipping and its average of the weights."""

    def __init__(self, unet: UNet, part: str, cache: LatentCache, batch: int) -> None:
        def choose(unet: UNet) -> None:
            for name, parameter in unet.named_parameters():
                parameter.requires_grad_(trains(part, name))

        settings = load_preset("paper").image_to_video.model_copy(update={"precision": "32-true", "ema_decay": 0.9999})
        vae = Autoencoder(AutoencoderConfig(block_out_channels=VAE_WIDTHS)).requires_grad_(False)
        self.module = Diffusion(unet, IMAGE_TO_VIDEO, settings, settings.phases[-1], vae, choose)
        self.module.configure_model()
        self.optimizer = make_optimizer(unet, settings, 1e-5)
        self.batches = batches(cache, batch)
        self.steps = 0

    def step(self) -> Tensor:
        """Take one step and return the loss."""
        loss = self.module.training_step(next(self.batches), 0)["loss"]
        loss.backward()
        self.module.configure_gradient_clipping(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.module.ema is not None:
            self.module.ema.update(self.steps)
        return loss.detach()


def write_cache(folder: Path, height: int = HEIGHT, width: int = WIDTH, clips: int = CLIPS) -> LatentCache:
    """Write a latent cache of random clips, as the stage `latents` lays it out."""
    draw = torch.Generator().manual_seed(0)
    moments = torch.randn(clips, FRAMES, 8, height // 8, width // 8, generator=draw)
    moments[:, :, 4:] = -12
    tensors = {
        "moments": moments.bfloat16(),
        "image": torch.randn(clips, FRAMES, CONTEXT, generator=draw).half(),
        "frame": torch.randint(0, 256, (clips, 3, height, width), generator=draw, dtype=torch.uint8),
        "text": torch.zeros(1, 1, CONTEXT).half(),
    }
    write_shard(folder / "shards" / "clips.safetensors", tensors)
    about = {"geometry": f"{FRAMES}x{height}x{width}", "split": "train", "fps": 7.0, "motion_bucket": 127}
    about |= {"camera": "static", "elevation": 0.0, "shard": "clips.safetensors"}
    rows = [
        {**about, "sample_id": str(number), "clip_id": str(number), "row": number, "captions": []}
        for number in range(clips)
    ]
    write_index(folder, rows, {"scaling_factor": 0.18215}, torch.zeros(1, CONTEXT))
    return LatentCache(folder)


def examples(cache: LatentCache) -> Examples:
    """Return all clips of a cache as training examples with a conditioning frame."""
    return Examples(cache, cache.index.rows, FRAMES, Draws(0, 0.7, 1.6, image_dropout=0.1, pixels=True))


def batches(cache: LatentCache, batch: int) -> Iterator[Batch]:
    """Yield batches without an end."""
    return iter(IndexedLoader(Buckets([examples(cache)], [batch], seed=0), 1 << 30))


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(cache: LatentCache, part: str, batch: int, repeats: int) -> float:
    """Measure and print one line; return the seconds of our step."""
    torch.manual_seed(0)
    their_unet: Any = UNetSpatioTemporalConditionModel(
        in_channels=8, block_out_channels=UNET_WIDTHS, num_attention_heads=tuple(width // 64 for width in UNET_WIDTHS),
        cross_attention_dim=CONTEXT,
    )  # fmt: skip
    unet = UNet(UNetConfig(in_channels=8, block_out_channels=UNET_WIDTHS, cross_attention_dim=CONTEXT, ids=3))
    unet.load_state_dict(their_unet.state_dict())
    theirs, ours = Theirs(their_unet, part), Ours(unet, part, cache, batch)
    clips = torch.rand(batch, FRAMES, 3, HEIGHT, WIDTH) * 2 - 1
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):  # the first of each makes the optimiser's state
        found[0].append(cpu_seconds(lambda: theirs.step(clips)))
        found[1].append(cpu_seconds(ours.step))
    one, other = (statistics.median(seconds[1:]) for seconds in found)
    ratios = [a / b for a, b in zip(found[0][1:], found[1][1:], strict=True)]
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
    encoding = statistics.median(cpu_seconds(lambda: theirs.observe(clips)) for _ in range(3))
    verdict = "met" if one / other >= GOAL else "MISSED"
    print(f"{part:9} {one:8.2f} {encoding:9.2f} {other:7.2f} {one / other:6.2f}x  {spread:>9}  {verdict}", flush=True)
    return other


def loading(folder: Path, height: int, width: int, batch: int) -> float:
    """Return the seconds that a batch takes to load, in this process."""
    source = batches(write_cache(folder, height, width), batch)
    return statistics.median(cpu_seconds(lambda: next(source)) for _ in range(8))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="steps of each; the median counts (default 5)")
    parser.add_argument("--batch", type=int, default=1, help="clips a step (default 1)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(f"torch {torch.__version__}, one thread, batches of {options.batch}; CPU seconds, medians")
        print("trains      theirs  encoding    ours   ratio      range")
        cache = write_cache(Path(folder) / "toy")
        steps = [compare(cache, part, options.batch, options.repeats) for part in ("all", "temporal")]
        share = loading(Path(folder) / "again", HEIGHT, WIDTH, options.batch) / min(steps)
        print(f"\nthe loader takes {share:.1%} of our shorter step ({'met' if share < WAITING else 'MISSED'})")
        seconds = loading(Path(folder) / "large", 320, 576, 4)
        print(f"a batch of four clips of {FRAMES}x320x576 takes {1000 * seconds:.0f} ms of a worker")


if __name__ == "__main__":
    main()
