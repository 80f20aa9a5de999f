"""New frames between those of a clip (§4.4, D.5): windows of five frames, chained over the whole clip."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from tqdm import tqdm

from svd.config import Sampling
from svd.core.errors import UserError
from svd.diffusion.edm import randn
from svd.diffusion.guidance import constant
from svd.generation.models import Models, check_request
from svd.generation.pipeline import generate_latents
from svd.tasks.interpolation import INTERPOLATION, RATE, WINDOW, from_ends


@torch.no_grad()
def interpolate(
    models: Models,
    video: Tensor,
    *,
    fps: float,
    motion_bucket: float,
    sampling: Sampling,
    seed: int,
    rounds: int = 1,
    cond_aug: float = 0.02,
    windows_at_once: int = 4,
    progress: bool = True,
) -> Tensor:
    """Generate three frames between any two: (N, 3, H, W) in [0, 1] to (4 (N - 1) + 1, 3, H, W), `rounds` times.

    28 frames become 109. fps: frames per second of `video`; the result has fps * 4^rounds. Each pair of neighbours
    is the first and last frame of a window of five. cond_aug: standard deviation of the noise on the two given
    latents. The given frames go through the autoencoder like the new ones, because a clip in which every fourth
    frame is sharper flickers. windows_at_once: windows denoised together; their noise, drawn from (seed, round,
    window), doesn't depend on it. Raises UserError when model and request don't fit.
    """
    check_request(models, INTERPOLATION, WINDOW, *video.shape[-2:])
    if len(video) < 2:
        raise UserError(f"interpolation needs at least 2 frames, got {len(video)}")
    for number in range(rounds):
        fps = fps * RATE
        latents = _interpolated(
            models, video, (seed, number), fps, motion_bucket, sampling, cond_aug, windows_at_once, progress
        )
        video = models.decode(latents[None], progress)[0]
    return video


def _interpolated(
    models: Models,
    video: Tensor,
    key: tuple[int, int],
    fps: float,
    motion_bucket: float,
    sampling: Sampling,
    cond_aug: float,
    at_once: int,
    progress: bool,
) -> Tensor:
    """Return scaled latents (4 (N - 1) + 1, C, h, w): those of the given frames, and of three new ones in each gap.

    key: seed and round.
    """
    frames = video.float() * 2 - 1
    tokens = models.encode_images(frames, models.decode_chunk)
    keys = models.encode_frames(frames[None])[0]
    scaling = models.autoencoder.config.scaling_factor
    pairs = torch.arange(len(video) - 1)
    out = keys[:1] * scaling
    for group in tqdm(pairs.split(at_once), desc="interpolate", unit="window group", disable=not progress):
        sources = [torch.Generator().manual_seed(_window_seed(*key, int(i))) for i in group]
        ends = torch.stack([keys[group], keys[group + 1]], 1)
        signals = from_ends(
            torch.stack([tokens[group], tokens[group + 1]], 1),
            ends,
            fps=fps,
            motion_bucket=motion_bucket,
            cond_aug=cond_aug,
            generators=sources,
        )
        noise = randn((len(ends), WINDOW, *ends.shape[2:]), sources)
        scale = constant(sampling.guidance, WINDOW)
        latents = generate_latents(models, INTERPOLATION, signals, noise, scale, sampling, progress=False)
        out = torch.cat([out, torch.cat([latents[:, 1:-1], ends[:, 1:] * scaling], 1).flatten(0, 1)])
    return out


def _window_seed(seed: int, number: int, window: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{number}/{window}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
