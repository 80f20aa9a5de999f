"""The networks that generation needs: loaded, checked against a request, and moved to the device while they work.

Clips are (B, T, 3, H, W), latents (B, T, C, h, w).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from svd.config import EncodersConfig
from svd.core.errors import UserError
from svd.diffusion.edm import Kind
from svd.diffusion.guidance import Passes
from svd.model.autoencoder import Autoencoder, posterior_mean
from svd.model.encoders import Encoders
from svd.model.formats.encoders import load_encoders
from svd.model.formats.folders import load_autoencoder, load_unet, trained_frames
from svd.model.unet import UNet
from svd.tasks.base import Task
from svd.tasks.registry import tasks_of_channels

Module = TypeVar("Module", bound=nn.Module)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """U-Net, autoencoder and encoders, and how they run; made by `load_models`.

    dtype: of the U-Net. kind: its preconditioning (`v` for models trained with the discrete schedule, `eps` for SD 2.1
    itself). offload: keep the networks on the CPU and move each to `device` for as long as it works. passes: how
    guidance runs. decode_chunk: frames decoded together; decode_overlap: frames that neighbouring chunks share.
    trained_frames, trained_size (height, width): of the clips in the U-Net's last training, where known.
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
        """The number that height and width of clips must be multiples of: what autoencoder and U-Net halve together."""
        return self.autoencoder.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def latent_shape(self, clips: int, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape (B, T, C, h, w) of the latents of clips."""
        factor = self.autoencoder.factor
        return clips, frames, self.autoencoder.config.latent_channels, height // factor, width // factor

    @contextmanager
    def working(self, module: Module) -> Iterator[Module]:
        """Have `module` on the device; with offloading, move it there now and back to the CPU afterwards."""
        if not self.offload:
            yield module
            return
        try:
            yield module.to(self.device)
        finally:
            module.to("cpu")

    def encode_texts(self, *groups: Sequence[str]) -> list[Tensor]:
        """Return context tokens (B, S, D) of each group of prompts.

        One group is encoded after the other, so that a prompt's embedding doesn't depend on the other groups' sizes.
        """
        with self.working(self.encoders.text) as text:
            return [text(group) for group in groups]

    def encode_images(self, images: Tensor, chunk: int | None = None) -> Tensor:
        """Return CLIP embeddings (B, D) of images (B, 3, H, W) in [-1, 1], `chunk` at a time (None: all at once)."""
        with self.working(self.encoders.image) as image:
            return torch.cat([image(part.to(self.device)) for part in images.split(chunk or len(images))])

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Return unscaled posterior means (B, T, C, h, w), float32 on the device, of frames in [-1, 1]."""
        with self.working(self.autoencoder) as autoencoder:
            dtype = next(autoencoder.parameters()).dtype
            return posterior_mean(autoencoder.encode(frames.to(self.device, dtype), self.decode_chunk)).float()

    def decode(self, latents: Tensor, progress: bool) -> Tensor:
        """Return clips (B, T, 3, H, W) in [0, 1], float32 on the CPU, of scaled latents; clip by clip, in chunks."""
        clips = []
        with self.working(self.autoencoder) as autoencoder:
            unscaled = (latents / autoencoder.config.scaling_factor).to(next(autoencoder.parameters()).dtype)
            for clip in tqdm(unscaled, desc="decode", unit="clip", disable=not progress):
                chunk = min(self.decode_chunk, len(clip))
                frames = autoencoder.decode(clip[None], chunk, self._overlap(len(clip)))
                clips.append((frames.float() / 2 + 0.5).clamp(0, 1).cpu())
        return torch.cat(clips)

    def _overlap(self, frames: int) -> int:
        return min(self.decode_overlap, self.decode_chunk - 1) if self.decode_chunk < frames else 0


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
    """Load the networks from folders in diffusers' layout and the output of the stage `encoders`.

    Raises UserError for folders that lack something, for a device that this machine lacks, and for parts that don't
    fit each other.
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


def check_request(models: Models, task: Task, frames: int, height: int, width: int) -> None:
    """Raise UserError when the U-Net isn't one of `task`, or when it can't make clips of this size.

    More frames or a larger size than in its training are possible, and the paper samples so (E.4), but the further
    beyond, the worse: a warning says so once.
    """
    found, needed = models.unet.config.in_channels, task.in_channels(models.autoencoder.config.latent_channels)
    if found != needed:
        raise UserError(
            f"this U-Net has {found} input channels ({tasks_of_channels(found)}), the task needs {needed} "
            f"({tasks_of_channels(needed)}); give the checkpoint of that task"
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
