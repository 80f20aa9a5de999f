"""Everything the U-Net is told besides the noisy latents (§2, D.2, D.4–D.6; released code where the paper is silent).

Text and image encoders of CLIP, micro-conditioning ids and the noise-augmented conditioning frame; what classifier-free
dropout takes away in training is drawn in svd.data.loader. Frames are (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kornia
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from svd.config import EncodersConfig
from svd.diffusion.edm import Generators, Network, expand, randn
from svd.diffusion.guidance import Condition
from svd.model.checkpoint import Lazy, fill, read_tensors
from svd.model.clip import load_clip, load_image_tower, tower_config
from svd.model.clip_keys import text_to_open_clip
from svd.model.sgm import read_sgm, told
from svd.model.weights import IMAGE_PART, TEXT_PART, weights_file
from svd.stage import UserError

MAX_IDS = 4
VOCABULARY = 49408  # of CLIP's tokenizer


class TextEncoder(nn.Module):
    """CLIP's text tower read at its penultimate layer, as Stable Diffusion 2.1 does: 77 x 1024 for ViT-H/14.

    whole: False for a tower without its last layer and projection, as SD 2.1's folders hold it. It gives the same
    context, but no vectors in the joint space.
    """

    def __init__(self, clip: open_clip.CLIP, whole: bool = True) -> None:
        super().__init__()
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.transformer = clip.transformer
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection if whole else None
        self._context_layers = len(clip.transformer.resblocks) - whole
        self.register_buffer("attn_mask", clip.attn_mask, persistent=False)
        self.context_length = int(clip.context_length)
        self._tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length)

    @property
    def width(self) -> int:
        """Size D of a token's embedding."""
        return self.positional_embedding.shape[1]

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """(B, 77) token ids between start and end token, zero padded; longer captions are cut."""
        return self._tokenizer(list(captions)).to(self.positional_embedding.device)

    def _hidden(self, tokens: Tensor, layers: int) -> Tensor:
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        mask = self.attn_mask[:length, :length].to(x.dtype)
        for block in self.transformer.resblocks[:layers]:
            x = block(x, attn_mask=mask)
        return self.ln_final(x)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Context tokens (B, 77, D): the output of the last layer but one, through the final layer norm."""
        return self._hidden(self.tokens(captions), self._context_layers)

    def project(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids to (B, E) in the joint space, not normalised; reads the end token of the last layer.

        Raises UserError for a tower that isn't whole.
        """
        if self.text_projection is None:
            raise UserError(
                "this text encoder has no last layer and no projection, so texts can't be compared with pictures; "
                "give the output of the stage 'encoders'"
            )
        end = tokens.argmax(1)
        # Attention is causal: what stands behind the end token can't change the result, so it isn't computed.
        x = self._hidden(tokens[:, : int(end.max()) + 1], len(self.transformer.resblocks))
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection

    def features(self, captions: Sequence[str]) -> Tensor:
        """(B, E) unit vectors in the space shared with `ImageEncoder.features`."""
        return F.normalize(self.project(self.tokens(captions)), dim=-1)


class ImageEncoder(nn.Module):
    """CLIP's image tower with its projection: one vector a picture, 1024 for ViT-H/14 (D.4; released code)."""

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("mean", torch.tensor(open_clip.OPENAI_DATASET_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(open_clip.OPENAI_DATASET_STD).reshape(3, 1, 1), persistent=False)

    @property
    def width(self) -> int:
        """Size E of the embedding."""
        return int(self.visual.output_dim)

    def preprocess(self, frames: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to CLIP's normalised input (B, 3, S, S).

        The released code's resize: bicubic with aligned corners after a Gaussian blur when the picture shrinks; the
        aspect ratio isn't kept. Other resizes shift the embedding.
        """
        return ((self._resize(frames.float()) + 1) / 2 - self.mean) / self.std

    def shrink(self, frames: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, S, S) in the same range: the resize of `preprocess`, which leaves them as they are."""
        return self._resize(frames.float())

    def _resize(self, planes: Tensor) -> Tensor:
        size = self.visual.image_size
        return kornia.geometry.resize(planes, size, interpolation="bicubic", align_corners=True, antialias=True)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to projected embeddings (B, E), not normalised."""
        return self.visual(self.preprocess(frames).to(self.visual.conv1.weight.dtype))

    def features(self, frames: Tensor) -> Tensor:
        """(B, E) unit vectors in the space shared with `TextEncoder.features`."""
        return F.normalize(self(frames), dim=-1)


class Encoders:
    """Frozen encoders. label: which weights these are, for reports (`toy-clip`, or open_clip model and weights)."""

    def __init__(self, text: TextEncoder | None, image: ImageEncoder | None, label: str) -> None:
        self._text, self._image, self.label = text, image, label

    @property
    def text(self) -> TextEncoder:
        """The text encoder; raises UserError when there is none, as in a released image-to-video model."""
        if self._text is None:
            raise UserError(f"{self.label} has no text encoder; give the output of the stage 'encoders'")
        return self._text

    @property
    def image(self) -> ImageEncoder:
        """The image encoder; raises UserError when there is none, as in a released text-to-image model."""
        if self._image is None:
            raise UserError(f"{self.label} has no image encoder; give the output of the stage 'encoders'")
        return self._image

    @property
    def widths(self) -> set[int]:
        """The cross-attention widths that the encoders can serve."""
        return {encoder.width for encoder in (self._text, self._image) if encoder is not None}

    @torch.no_grad()
    def image_features(self, frames: Tensor) -> Tensor:
        """Unit vectors (B, E) of frames (B, 3, H, W) in [-1, 1]; with `text_features`, dot products are CLIP scores."""
        return self.image.features(frames)

    @torch.no_grad()
    def shrink(self, frames: Tensor) -> Tensor:
        """Planes (B, C, H, W) in [-1, 1] at the size that the image encoder reads, for `image_features`; see there."""
        return self.image.shrink(frames)

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors (B, E) of captions."""
        return self.text.features(captions)

    def to(self, *args: Any) -> Encoders:
        """Move both encoders, as nn.Module.to."""
        text = None if self._text is None else self._text.to(*args)
        image = None if self._image is None else self._image.to(*args)
        return Encoders(text, image, self.label)


def load_text_encoder(
    tensors: Mapping[str, Lazy], what: str, device: torch.device | str = "cpu", head_channels: int = 64
) -> TextEncoder:
    """SD 2.1's text encoder, frozen, float32: open_clip's whole text tower, as single files hold it.

    tensors: open_clip's names. what: the beginning of messages. head_channels: 64 in all of open_clip's released text
    towers. Raises UserError for missing, unexpected and misshaped tensors.
    """
    with told(what):
        length, width = tensors["positional_embedding"].shape
        vocabulary, embedding = tensors["token_embedding.weight"].shape[0], tensors["text_projection"].shape[1]
    layers = len({name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")})
    cfg = open_clip.CLIPTextCfg(length, vocabulary, width=width, heads=max(1, width // head_channels), layers=layers)
    # CLIP's temperature is no part of the tower, and the mask, which old versions stored, is a constant.
    own = {name: tensor for name, tensor in tensors.items() if name not in ("logit_scale", "attn_mask")}
    return _text_encoder(cfg, embedding, own, what, device)


def load_text_folder(path: Path, device: torch.device | str = "cpu") -> TextEncoder:
    """SD 2.1's text encoder, frozen, float32, from a folder in transformers' layout (CLIPTextModel).

    Its last layer is the last but one of open_clip's tower, which SD reads: the folder has 23 layers of ViT-H's 24.
    The tokens are those of SD 2.1's `tokenizer/` (CLIP's vocabulary, padded with token 0). Raises UserError for
    missing, broken and unfitting files.
    """
    config = tower_config(path, "CLIPTextModel", "vocab_size", "max_position_embeddings")
    if config["vocab_size"] != VOCABULARY:
        raise UserError(f"{path / 'config.json'}: a vocabulary of {config['vocab_size']}, CLIP's has {VOCABULARY}")
    cfg = open_clip.CLIPTextCfg(
        config["max_position_embeddings"],
        VOCABULARY,
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        mlp_ratio=config["intermediate_size"] / config["hidden_size"],
    )
    tensors = text_to_open_clip(read_tensors(weights_file(path, "model")), str(path))
    return _text_encoder(cfg, None, tensors, f"{path} doesn't fit its config.json", device)


def _text_encoder(
    cfg: open_clip.CLIPTextCfg,
    embedding: int | None,
    tensors: Mapping[str, Lazy],
    what: str,
    device: torch.device | str,
) -> TextEncoder:
    """The tower, filled; embedding: size of the joint space, None for a tower that isn't whole."""
    with torch.device("meta"):
        clip = open_clip.CLIP(embedding or 1, open_clip.CLIPVisionCfg(layers=1, image_size=16), cfg)
        encoder = TextEncoder(clip, embedding is not None)
    fill(encoder, tensors, what, device, torch.float32)
    length = cfg.context_length
    encoder.attn_mask = torch.full((length, length), float("-inf"), device=device).triu_(1)
    return encoder.requires_grad_(False).eval()


def load_encoders(folder: Path, config: EncodersConfig, device: torch.device | str = "cpu") -> Encoders:
    """The encoders that the stage `encoders` left in `folder`, frozen, float32.

    A released model is accepted too, as a pipeline in diffusers' layout or as a single file: SVD's holds an image
    encoder, SD 2.1's a text encoder. Raises UserError when the encoders can't be had.
    """
    if folder.is_file():
        return _of_file(folder, device)
    parts = [part for part in (TEXT_PART, IMAGE_PART) if (folder / part / "config.json").is_file()]
    if parts:
        text = load_text_folder(folder / TEXT_PART, device) if TEXT_PART in parts else None
        image = _image_encoder(folder / IMAGE_PART, device) if IMAGE_PART in parts else None
        kinds = " and ".join(part.replace("_", " ") for part in parts)
        return Encoders(text, image, f"{kinds} of {folder.name}")
    clip, label = load_clip(folder, config, device)
    clip.requires_grad_(False)
    return Encoders(TextEncoder(clip).to(device).eval(), ImageEncoder(clip.visual).to(device).eval(), label)


def _of_file(file: Path, device: torch.device | str) -> Encoders:
    if text := read_sgm(file).text:
        encoder = load_text_encoder(text, f"{file}: text encoder", device)
        return Encoders(encoder, None, f"text encoder of {file.name}")
    return Encoders(None, _image_encoder(file, device), f"image encoder of {file.name}")


def _image_encoder(path: Path, device: torch.device | str) -> ImageEncoder:
    return ImageEncoder(load_image_tower(path, device).requires_grad_(False)).to(device).eval()


def from_uint8(frames: NDArray[np.uint8]) -> Tensor:
    """(T, H, W, 3) uint8 to (T, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


def fps_id(fps: float) -> float:
    """The frame rate as the U-Net is told it: fps - 1 (released code and diffusers; a clip at 7 fps has id 6)."""
    return fps - 1


def polar_angle(elevation_degrees: float) -> float:
    """Elevation as the multi-view model is told it: the angle from the vertical axis in radians, pi/2 at the equator.

    The paper (D.6) embeds "the elevation" without a unit; this is the convention of its successor SV3D (`polars_rad`).
    """
    if not -90 <= elevation_degrees <= 90:
        raise UserError(f"an elevation must lie between -90 and 90 degrees, got {elevation_degrees}")
    return math.radians(90 - elevation_degrees)


def micro_conditioning(
    count: int,
    batch: int,
    *,
    fps: float,
    motion_bucket: float,
    cond_aug: float = 0.0,
    elevation_degrees: float | Sequence[float] = 0.0,
) -> Tensor | None:
    """The first `count` of [fps - 1, motion bucket, cond_aug, polar angle] for each of `batch` clips: (B, count)
    float32.

    count: the U-Net's `ids`; 0 gives None. cond_aug: the standard deviation of the noise on the conditioning frame,
    raw, not its logarithm (the order and this convention are the released configuration's).
    """
    if count == 0:
        return None
    if count > MAX_IDS:
        raise UserError(f"the U-Net wants {count} conditioning ids; known are fps, motion bucket, cond_aug, elevation")
    elevations = [elevation_degrees] * batch if isinstance(elevation_degrees, float | int) else elevation_degrees
    if len(elevations) != batch:
        raise UserError(f"{len(elevations)} elevations for {batch} clips; give one for all or one each")
    rows = [[fps_id(fps), motion_bucket, cond_aug, polar_angle(elevation)] for elevation in elevations]
    return torch.tensor(rows, dtype=torch.float32)[:, :count]


def noise_augment(frames: Tensor, sigma: Tensor, generators: Generators = None) -> Tensor:
    """The conditioning frame with noise, in pixel space before the autoencoder (D.4): frames + sigma * noise.

    frames (B, …), sigma (B,); in training ln(sigma) ~ N(-3, 0.5^2). For the interpolation model the same is done to
    latents.
    """
    noise = randn(frames.shape, generators).to(frames)
    return frames + expand(sigma.to(frames), frames) * noise


def conditioned(unet: nn.Module, condition: Condition) -> Network:
    """The network F(x_BTCHW, c_noise_B) of a U-Net with its conditioning in place; x is cast to the U-Net's type."""
    dtype = next(unet.parameters()).dtype
    context = condition.context.to(dtype)
    time_context = None if condition.time_context is None else condition.time_context.to(dtype)

    def network(x: Tensor, c_noise: Tensor) -> Tensor:
        if condition.concat is not None:
            x = torch.cat([x, condition.concat.to(x.dtype)], dim=2)
        return unet(
            x.to(dtype),
            c_noise,
            context,
            condition.ids,
            time_context_BLD=time_context,
            image_only_B=condition.image_only,
        )

    return network
