"""Previews for people: what a model under training generates for a few test clips, beside the clips themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from svd.config import Sampling
from svd.diffusion import edm
from svd.diffusion.denoising import denoise_latents
from svd.diffusion.guidance import constant, linear
from svd.latents.loader import Batch, Examples
from svd.media.video import Frames, filmstrip, to_uint8, write_mp4, write_png
from svd.model.autoencoder import Autoencoder
from svd.model.unet import UNet
from svd.tasks.base import Task
from svd.tasks.signals import dropped
from svd.training.parallel import first_rank

SHOWN = 4
DECODED_AT_ONCE = 8


@dataclass(frozen=True)
class Preview:
    """Generates a few validation clips with their own conditioning; deterministic.

    The guidance of models with a conditioning frame rises over the frames from 1 to `sampling.guidance` (D.4.1); that
    of the others is constant.
    """

    task: Task
    examples: Examples
    autoencoder: Autoencoder
    sampling: Sampling
    kind: edm.Kind

    def batch(self, device: torch.device) -> Batch:
        """Return the shown clips, evenly spaced over the test samples so that they come from different sources."""
        count = min(SHOWN, len(self.examples))
        chosen = [i * len(self.examples) // count for i in range(count)]
        collated: Batch = default_collate([self.examples[i] for i in chosen])
        return {key: value.to(device) for key, value in collated.items()}

    @torch.no_grad()
    def generate(self, unet: UNet, autoencoder: Autoencoder, batch: Batch) -> Tensor:
        """Return scaled latents (B, T, C, h, w)."""
        signals = self.task.observe(batch, autoencoder)
        uncond = dropped(signals, self.examples.cache.null_text)
        frames, guidance = signals.frames, self.sampling.guidance
        scale = linear(1.0, max(1.0, guidance), frames) if self.task.pixels else constant(guidance, frames)
        with tqdm(
            total=self.sampling.steps, desc="samples", unit="step", leave=False, delay=2, disable=not first_rank()
        ) as bar:
            return denoise_latents(
                unet,
                batch["noise"],
                self.task.build(signals, unet),
                self.task.build(uncond, unet),
                scale,
                self.sampling,
                self.kind,
                progress=lambda done, steps: bar.update(),
            )

    @torch.no_grad()
    def films(self, unet: UNet) -> list[tuple[Frames, Frames, float]]:
        """Return for each shown clip generated and real frames (T, H, W, 3) uint8 and frames per second."""
        device = next(unet.parameters()).device
        autoencoder = self.autoencoder.to(device)
        batch = self.batch(device)
        made, real = self.generate(unet, autoencoder, batch), batch["latents"]
        clips = [self._decode(autoencoder, latents, batch) for latents in (made, real)]
        rates = batch["fps"].tolist()
        return [(clips[0][i], clips[1][i], rates[i]) for i in range(len(rates))]

    def _decode(self, autoencoder: Autoencoder, latents: Tensor, batch: Batch) -> list[Frames]:
        unscaled = latents / edm.expand(batch["scaling_factor"], latents)
        videos = autoencoder.decode(unscaled.to(next(autoencoder.parameters()).dtype), DECODED_AT_ONCE)
        return [to_uint8((video.float() / 2 + 0.5).cpu().numpy()) for video in videos]


def preview_sheet(films: list[tuple[Frames, Frames, float]]) -> Frames:
    """Join film strips, generated above real, into one image (H, W, 3)."""
    strips = [filmstrip(frames, 8) for made, real, _ in films for frames in (made, real)]
    return np.concatenate(strips)


def write_films(films: list[tuple[Frames, Frames, float]], folder: Path) -> None:
    """Write `generated-<n>.mp4` (`.png` for one frame), `real-<n>.*` and `sheet.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (made, real, fps) in enumerate(films):
        for name, frames in (("generated", made), ("real", real)):
            if len(frames) > 1:
                write_mp4(folder / f"{name}-{number}.mp4", frames, fps)
            else:
                write_png(folder / f"{name}-{number}.png", frames[0])
    write_png(folder / "sheet.png", preview_sheet(films))
