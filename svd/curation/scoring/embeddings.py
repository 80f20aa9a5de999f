"""CLIP scores of first, middle and last frame: similarity with every caption, aesthetics, NSFW (§3.1, App. C).

The similarity of a clip and a caption is the mean of the cosines of the three frames. The score that clips are filtered
by is the mean over the captions that describe content (all but `motion`). The paper leaves both open.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from svd.core.errors import UserError
from svd.curation.captions.base import MOTION, Caption

LARGE = 1 << 18  # pixels; smaller frames take little memory and are shrunk faster in a batch


class ClipEncoders(Protocol):
    """The part of svd.model.encoders.Encoders that scoring needs."""

    def image_features(self, frames: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to features (B, E)."""

    def text_features(self, texts: list[str]) -> Tensor:
        """Map B strings to features (B, E)."""


@runtime_checkable
class Shrinking(Protocol):
    """Encoders that can shrink a frame before it is batched, so that one large frame is in memory at a time."""

    def shrink(self, frames: Tensor) -> Tensor:
        """Shrink planes (B, C, H, W) in [-1, 1] to the input size, (B, C, S, S), with the same `image_features`."""


def frames_to_tensor(frames: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Convert frames (B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1]."""
    planes = torch.as_tensor(frames).to(device).permute(0, 3, 1, 2).contiguous()
    return planes.float().div_(127.5).sub_(1)


@torch.inference_mode()
def image_embeddings(frames: Iterable[Iterable[np.ndarray]], encoders: ClipEncoders, batch: int, device: str) -> Tensor:
    """Return the unit-length embeddings (N, 3, E) float32 of the three frames (H, W, 3) uint8 of N clips.

    Frames of one size go through the network together, `batch` at a time, whichever clips they come from. Large frames
    are shrunk as they come, where the encoders can do that, and not kept.
    """
    shapes: list[tuple[int, ...]] = []
    inputs: list[Tensor] = []
    for frame in itertools.chain.from_iterable(frames):
        shapes.append(frame.shape[:2])
        inputs.append(_input(frame, encoders, device))
    order = sorted(range(len(inputs)), key=lambda at: (shapes[at], at))
    found: dict[int, Tensor] = {}
    for start, stop in _runs([shapes[at] for at in order], batch):
        chosen = torch.stack([inputs[at] for at in order[start:stop]])
        pixels = chosen if chosen.is_floating_point() else frames_to_tensor(chosen, device)
        features = nn.functional.normalize(encoders.image_features(pixels).float(), dim=-1).cpu()
        found.update(zip(order[start:stop], features, strict=True))
    return torch.stack([found[at] for at in range(len(inputs))]).unflatten(0, (-1, 3))


def _input(frame: np.ndarray, encoders: ClipEncoders, device: str) -> Tensor:
    """Return what is kept of a frame (H, W, 3) uint8 until its batch is full: (3, S, S) in [-1, 1], or the frame."""
    if isinstance(encoders, Shrinking) and frame.shape[0] * frame.shape[1] > LARGE:
        # Plane by plane: blurring all planes together takes many times their own memory.
        return torch.cat([encoders.shrink(frames_to_tensor(frame[None, ..., [c]], device))[0] for c in range(3)])
    return torch.from_numpy(frame)


def _runs(shapes: Sequence[tuple[int, ...]], batch: int) -> list[tuple[int, int]]:
    """Split into runs [start, stop) of equal shapes, at most `batch` long."""
    runs: list[tuple[int, int]] = []
    start = 0
    for stop in range(1, len(shapes) + 1):
        if stop == len(shapes) or shapes[stop] != shapes[start] or stop - start == batch:
            runs.append((start, stop))
            start = stop
    return runs


@torch.inference_mode()
def text_embeddings(texts: Sequence[str], encoders: ClipEncoders, batch: int) -> dict[str, Tensor]:
    """Return the unit-length embedding (E,) of every distinct text."""
    distinct = sorted(set(texts))
    found: dict[str, Tensor] = {}
    for start in range(0, len(distinct), batch):
        chunk = distinct[start : start + batch]
        features = nn.functional.normalize(encoders.text_features(chunk).float(), dim=-1).cpu()
        found.update(zip(chunk, features, strict=True))
    return found


def similarities(images: Tensor, captions: Sequence[Caption], texts: Mapping[str, Tensor]) -> list[tuple[str, float]]:
    """Return the cosine similarity of a clip to each caption, with its captioner, sorted by that.

    It is the mean over the frames of the clip, images (3, E), to 5 decimals.
    """
    ordered = sorted(captions, key=lambda caption: caption[0])
    return [(name, round(float((images @ texts[text]).mean()), 5)) for name, text in ordered]


def similarity_score(by_captioner: Sequence[tuple[str, float]]) -> float | None:
    """Return the score that clips are filtered by: the mean over captions of content; None without such a caption."""
    values = [value for name, value in by_captioner if name != MOTION]
    return round(sum(values) / len(values), 5) if values else None


class AestheticsHead(nn.Module):
    """LAION's aesthetics predictor: maps unit-length CLIP embeddings (B, E) to scores (B,) of about 1 to 10.

    Both published forms load: the single linear layer (`sa_0_4_*_linear`) and the MLP without activations
    (`sac+logos+ava1-l14-linearMSE`, layers 1024-128-64-16-1).
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        self.width = next(m for m in layers if isinstance(m, nn.Linear)).in_features

    def forward(self, embeddings: Tensor) -> Tensor:
        """Score unit-length embeddings (B, E): (B,)."""
        return self.layers(embeddings.to(self.layers[0].weight)).squeeze(-1)


def load_aesthetics(path: Path) -> AestheticsHead:
    """Load the head from a .pth or .safetensors file; raises UserError when it isn't one of the published forms."""
    published = "published by LAION-AI/aesthetic-predictor and christophschuhmann/improved-aesthetic-predictor"
    return AestheticsHead(nn.Sequential(*_linear_layers(path, "encoders.aesthetics_weights", published))).eval()


def load_nsfw(path: Path) -> NsfwScorer:
    """Load an NSFW head (.safetensors or .pth); raises UserError unless it is linear layers to one logit."""
    published = "LAION-AI/CLIP-based-NSFW-Detector publishes heads; convert the Keras file to <i>.weight and <i>.bias"
    return NsfwScorer(_linear_layers(path, "curation.nsfw_weights", published))


def _linear_layers(path: Path, option: str, published: str) -> list[nn.Linear]:
    """Load the linear layers of a file with `….<i>.weight` (out, in) and bias, in the order of their numbers."""
    if not path.is_file():
        raise UserError(f"{option}: '{path}' does not exist; {published}")
    try:
        state: dict[str, Any] = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        weights = sorted(
            (name for name in state if name.endswith("weight")),
            key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")],
        )
        layers = [nn.Linear(*reversed(state[name].shape)) for name in weights]
        for layer, name in zip(layers, weights, strict=True):
            layer.weight.data = state[name].float()
            layer.bias.data = state[name.removesuffix("weight") + "bias"].float()
        if not layers or layers[-1].out_features != 1:
            raise ValueError("its last layer does not give one score")
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a head of linear layers on CLIP embeddings ({option}): {reason}") from None
    return layers


@torch.inference_mode()
def aesthetics(images: Tensor, head: AestheticsHead) -> Tensor:
    """Return the mean score of the three frames: unit-length (N, 3, E) to (N,).

    Raises UserError for a head of another width.
    """
    if images.shape[-1] != head.width:
        raise UserError(
            f"encoders.aesthetics_weights: the head wants embeddings of width {head.width}, "
            f"the image encoder gives {images.shape[-1]}; use the head made for this encoder (ViT-L/14: 768)"
        )
    return head(images.flatten(0, 1)).unflatten(0, (-1, 3)).mean(1)


class NsfwScorer:
    """A head that predicts whether a clip is not safe for work: linear layers with ReLU on unit-length embeddings."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = list(layers)

    @torch.inference_mode()
    def scores(self, images: Tensor) -> Tensor:
        """Return the highest probability of the three frames: unit-length (N, 3, E) to (N,) in [0, 1].

        Raises UserError for a head of another width.
        """
        width = self.layers[0].in_features
        if images.shape[-1] != width:
            raise UserError(f"curation.nsfw_weights: made for embeddings of width {width}, not {images.shape[-1]}")
        hidden = images
        for layer in self.layers[:-1]:
            hidden = torch.relu(layer(hidden))
        return torch.sigmoid(self.layers[-1](hidden)).squeeze(-1).amax(1)
