"""The parts of generation that all four tasks share: loading, checks, noise, the solver's run, decoding.

Clips are (B, T, 3, H, W), latents (B, T, C, h, w).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from svd.config import EncodersConfig, Sampling
from svd.core.errors import UserError
from svd.diffusion.edm import DiscreteSchedule, Kind, denoiser
from svd.diffusion.guidance import Condition, Passes, conditioned, guided
from svd.diffusion.sampler import karras_sigmas, sample
from svd.model.autoencoder import Autoencoder, mean
from svd.model.encoders import Encoders
from svd.model.formats.encoders import load_encoders
from svd.model.formats.folders import load_autoencoder, load_unet, trained_frames
from svd.model.unet import UNet

Module = TypeVar("Module", bound=nn.Module)
logger = logging.getLogger(__name__)

TASKS = {4: "text-to-video", 8: "image-to-video or multi-view", 9: "interpolation"}
_SEEDS = 2**63 - 1


@dataclass(frozen=True)
class Models:
    """What generation needs. dtype: of the U-Net.

    kind: the U-Net's preconditioning (`v` for models trained with the discrete schedule, `eps` for SD 2.1 itself).
    offload: keep the networks on the CPU and move each to `device` for as long as it works. passes: how guidance
    runs. decode_chunk: frames decoded together; decode_overlap: frames that neighbouring chunks share. trained_frames,
    trained_size (height, width): of the clips that the U-Net was trained on last, where that is known.
    """

    unet: UNet
    autoencoder: Autoencoder
    encoders: Encoders
    device: torch.device
    dtype: torch.dtype
    kind: Kind = "edm-v"
    offload: bool = False
    passes: Passes = "auto"
    decode_chunk: int = 16
    decode_overlap: int = 4
    trained_frames: int | None = None
    trained_size: tuple[int, int] | None = None

    @property
    def multiple(self) -> int:
        """Height and width of clips must be multiples of this: what autoencoder and U-Net halve together."""
        return self.autoencoder.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)


def load_models(
    unet_folder: Path,
    autoencoder_folder: Path,
    encoders_folder: Path,
    config: EncodersConfig,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    kind: Kind = "edm-v",
) -> Models:
    """Load the networks; folders in diffusers' layout and the output of the stage `encoders`.

    Raises UserError for folders that lack something, for a device that this machine lacks, and for parts that don't
    fit.
    """
    device = _device(device)
    home = torch.device("cpu") if offload else device
    unet = load_unet(Path(unet_folder), device=home, dtype=dtype)
    # The first stage overflows in float16 (`force_upcast` in its released configuration).
    stage_dtype = torch.float32 if dtype == torch.float16 else dtype
    autoencoder = load_autoencoder(Path(autoencoder_folder), device=home, dtype=stage_dtype)
    encoders = load_encoders(Path(encoders_folder), config, home)
    width = unet.config.cross_attention_dim
    if width not in encoders.widths:
        found = " and ".join(map(str, sorted(encoders.widths)))
        raise UserError(f"{unet_folder}: cross-attention width {width}, the encoders in {encoders_folder} give {found}")
    for module in (unet, autoencoder):
        module.eval().requires_grad_(False)
    frames = trained_frames(Path(unet_folder))
    return Models(unet, autoencoder, encoders, device, dtype, kind, offload, trained_frames=frames)


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' can't be used here: {str(error).splitlines()[0]}") from None
    return device


def check(models: Models, channels: int, frames: int, height: int, width: int) -> None:
    """Raises UserError when the U-Net isn't of the task with `channels`, or when it can't make clips of this size.

    Frames or a size beyond those of its training are possible, and the paper samples so (E.4), but the farther the
    worse: a line of warning says so once.
    """
    found = models.unet.config.in_channels
    if found != channels:
        kind = TASKS.get(found, "unknown")
        raise UserError(
            f"this U-Net has {found} input channels ({kind}), the task needs {channels} ({TASKS[channels]}); "
            "give the checkpoint of that task"
        )
    if height % models.multiple or width % models.multiple or height <= 0 or width <= 0:
        near = [max(1, round(side / models.multiple)) * models.multiple for side in (height, width)]
        raise UserError(
            f"size {height}x{width}: height and width must be multiples of {models.multiple} for these models; "
            f"the nearest size is {near[0]}x{near[1]}"
        )
    if frames < 1:
        raise UserError(f"a clip needs at least 1 frame, not {frames}")
    if frames > 1 and not models.unet.config.temporal:
        raise UserError(f"this U-Net is an image model: it makes 1 frame, not {frames}")
    beyond = []
    if models.trained_frames is not None and frames > models.trained_frames:
        beyond.append(f"{frames} frames (trained on {models.trained_frames})")
    if models.trained_size is not None and (height > models.trained_size[0] or width > models.trained_size[1]):
        beyond.append(f"{height}x{width} (trained on {models.trained_size[0]}x{models.trained_size[1]})")
    if beyond:
        _warn_once(f"{' and '.join(beyond)}: more than this model has learned; expect artefacts and copies of objects")


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def generators(seed: int | Sequence[int], batch: int) -> list[torch.Generator]:
    """A CPU generator for each clip: seeds as given, or seed, seed + 1, … Raises UserError for a wrong number of
    seeds.
    """
    seeds = [seed + i for i in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise UserError(f"{len(seeds)} seeds for {batch} clips; give one for all or one each")
    if any(not 0 <= value <= _SEEDS for value in seeds):
        raise UserError(f"seeds must lie between 0 and 2^63 - 1, got {seeds}")
    return [torch.Generator().manual_seed(value) for value in seeds]


def latent_shape(models: Models, batch: int, frames: int, height: int, width: int) -> tuple[int, ...]:
    """Shape of the latents of `batch` clips."""
    factor = models.autoencoder.factor
    return batch, frames, models.autoencoder.config.latent_channels, height // factor, width // factor


@contextmanager
def working(models: Models, module: Module) -> Iterator[Module]:
    """`module` on the device; with offloading it is moved there now and back to the CPU afterwards."""
    if not models.offload:
        yield module
        return
    try:
        yield module.to(models.device)
    finally:
        module.to("cpu")


def noise_levels(sampling: Sampling, kind: Kind) -> Tensor:
    """(steps + 1,) levels: the discrete schedule's for `ddim` with a discrete model, Karras' otherwise.

    A discrete model knows only the levels of its schedule, so Karras' range is cut to them.
    """
    schedule = DiscreteSchedule()
    if kind == "edm-v":
        return karras_sigmas(sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)
    if sampling.solver == "ddim":
        return schedule.ddim_sigmas(sampling.steps)
    low, high = schedule.sigmas[[0, -1]].tolist()
    return karras_sigmas(sampling.steps, max(low, sampling.sigma_min), min(high, sampling.sigma_max), sampling.rho)


def place(condition: Condition, device: torch.device) -> Condition:
    """The condition on a device."""
    values = {field.name: getattr(condition, field.name) for field in fields(Condition)}
    return Condition(**{name: None if value is None else value.to(device) for name, value in values.items()})


def denoise(
    models: Models,
    noise: Tensor,
    cond: Condition,
    uncond: Condition,
    scale: Tensor,
    sampling: Sampling,
    progress: bool,
) -> Tensor:
    """Scaled latents (B, T, C, h, w) float32 on the device, from unit noise; `scale` (T,) is the guidance of each
    frame.
    """
    cond, uncond = place(cond, models.device), place(uncond, models.device)
    with (
        working(models, models.unet) as unet,
        tqdm(total=sampling.steps, desc="denoise", unit="step", disable=not progress) as bar,
    ):

        def network(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            return denoiser(conditioned(unet, condition), models.kind)(x, sigma)

        return sample(
            guided(network, cond, uncond, scale.to(models.device), models.passes),
            noise.to(models.device),
            noise_levels(sampling, models.kind),
            sampling.solver,
            lambda done, total: bar.update(),
        )


def encode(models: Models, frames: Tensor) -> Tensor:
    """Unscaled posterior means (B, T, C, h, w) float32 on the device, of frames (B, T, 3, H, W) in [-1, 1]."""
    with working(models, models.autoencoder) as autoencoder:
        dtype = next(autoencoder.parameters()).dtype
        return mean(autoencoder.encode(frames.to(models.device, dtype), models.decode_chunk)).float()


def decode(models: Models, latents: Tensor, progress: bool) -> Tensor:
    """Clips (B, T, 3, H, W) in [0, 1], float32 on the CPU, of scaled latents; clip by clip, in chunks of frames."""
    clips = []
    with working(models, models.autoencoder) as autoencoder:
        unscaled = (latents / autoencoder.config.scaling_factor).to(next(autoencoder.parameters()).dtype)
        for clip in tqdm(unscaled, desc="decode", unit="clip", disable=not progress):
            frames = autoencoder.decode(clip[None], min(models.decode_chunk, len(clip)), _overlap(models, len(clip)))
            clips.append((frames.float() / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(clips)


def _overlap(models: Models, frames: int) -> int:
    return min(models.decode_overlap, models.decode_chunk - 1) if models.decode_chunk < frames else 0
