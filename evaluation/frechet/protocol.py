"""Evaluation protocols: every choice that changes a Fréchet distance, frozen and hashed (App. E.4).

Two numbers may be compared only when the digests of their protocols are equal; every row, cache key and tracker tag
carries the digest. How clips were sampled is no part of a protocol: results hold that beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from svd.core.errors import UserError

# The Kinetics-400 I3D that the paper and StyleGAN-V use; only this file earns the name "fvd".
I3D_TORCHSCRIPT_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"

OFFICIAL_CLIPS = 13_320  # of UCF-101


class ScoreError(UserError, ValueError):
    """Clips that can't be scored, or a score that would mean nothing."""


@dataclass(frozen=True)
class Resize:
    """Bilinear resize to (height, width).

    width None: the short side becomes `height`. cover: keep the aspect ratio, with the smallest size that covers
    (height, width). legacy: TensorFlow 1's `resize_bilinear`, without half-pixel centres and antialiasing.
    """

    height: int
    width: int | None = None
    antialias: bool = False
    legacy: bool = False
    cover: bool = False

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Return the size that an image of (height, width) gets."""
        if self.width is not None and not self.cover:
            return self.height, self.width
        if self.width is not None:
            scale = max(self.height / height, self.width / width)
            return round(height * scale), round(width * scale)
        # Rounded up as in VideoGPT's loader, which cd-fvd and JunyaoHu took over.
        long_side = math.ceil(round(max(height, width) * self.height / min(height, width), 6))
        return (self.height, long_side) if height < width else (long_side, self.height)


@dataclass(frozen=True)
class Crop:
    """Centre crop to (height, width)."""

    height: int
    width: int


@dataclass(frozen=True)
class FeatureNet:
    """The network behind a score: file, layer, precision, and how its input is prepared.

    dimension: size of its feature vectors. minimum_frames: the shortest clip that it takes. input: the resizes before
    it. rounds: True gives it uint8, rounded after these resizes; False gives it float32, resized from rounded images.
    """

    name: Literal["i3d", "transnetv2", "videomae"]
    layer: str
    dimension: int
    minimum_frames: int
    input: tuple[Resize, ...]
    sha256: str | None = None
    rounds: bool = True
    dtype: Literal["float32"] = "float32"


# The TorchScript file resizes to 224×224 by itself (resize=True), so it gets the cropped image as it is.
I3D = FeatureNet("i3d", "400 logits averaged over time", 400, 9, (), sha256=I3D_TORCHSCRIPT_SHA256)
TRANSNETV2 = FeatureNet("transnetv2", "relu(fc1) averaged over frames", 1024, 1, (Resize(27, 48, antialias=True),))
# cd-fvd's network: VideoMAE v2, ViT-g, fine-tuned on Something-Something v2; pixels in [0, 1], not normalised.
VIDEOMAE = FeatureNet("videomae", "fc_norm of the mean token", 1408, 16, (Resize(224, 224),), rounds=False)


@dataclass(frozen=True)
class EvalProtocol:
    """One way to score generated clips against a data set.

    real, generated: numbers of clips; None for as many as there are, until a score fixes them. frames: of a generated
    clip the first ones; of a real clip every round(native / fps)-th (fps None: consecutive ones) from a start drawn
    from the SHA-256 of `Class/file`, so that neither a global generator nor an order matters. steps, real_steps: bring
    a generated or a real clip to the size of the comparison; `net.input` follows. prompt: the raw class identifier as
    in the paper, or the caption that the fixture's `prompts.json` has for the class.
    """

    name: str
    dataset: str
    net: FeatureNet
    steps: tuple[Resize | Crop, ...]
    real_steps: tuple[Resize | Crop, ...]
    frames: int = 16
    fps: float | None = None
    prompt: Literal["class", "caption"] = "class"
    start: str = "generated: first; real: SHA-256 of Class/file"
    rounding: Literal["half-even", "truncate"] = "half-even"
    real: int | None = None
    generated: int | None = None
    ddof: Literal[0, 1] = 0
    solver: str = "nuclear norm of scatter roots, float64"

    def digest(self) -> str:
        """Return twelve hex digits that change with every value but the name.

        They are equal on every machine and in every version of the code.
        """
        values = asdict(self)
        del values["name"]
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def describe(self) -> dict[str, object]:
        """Return all choices as JSON values, with the digest."""
        return {**asdict(self), "digest": self.digest()}

    def changed(self, **values: Any) -> EvalProtocol:
        """Return the protocol with other values; those that differ become part of its name.

        >>> named_protocols()["tf_original"].changed(frames=8).name
        'tf_original[frames=8]'
        """
        new = {name: value for name, value in values.items() if value != getattr(self, name)}
        if not new:
            return self
        said = ",".join(f"{name}={_said(value)}" for name, value in new.items())
        name = f"{self.name[:-1]},{said}]" if self.name.endswith("]") else f"{self.name}[{said}]"
        return replace(self, name=name, **new)

    def with_weights(self, sha256: str) -> EvalProtocol:
        """Return the protocol with the hash of the network's file; other weights than its own change the name."""
        net = replace(self.net, sha256=sha256)
        return replace(self, net=net) if self.net.sha256 is None else self.changed(net=net)

    def generated_frames(self, clip: str, available: int) -> list[int]:
        """Return the numbers of the frames used of a generated clip; raises ScoreError when it is too short."""
        if available < self.frames:
            raise ScoreError(f"{clip}: {available} frames, protocol {self.name} needs {self.frames}")
        return list(range(self.frames))

    def real_frames(self, clip: str, available: int, native_fps: float) -> list[int]:
        """Return the numbers of the frames used of a real clip, `Class/file`; raises ScoreError for too short ones."""
        stride = 1 if self.fps is None else max(1, round(native_fps / self.fps))
        span = (self.frames - 1) * stride + 1
        if available < span:
            raise ScoreError(f"{clip}: {available} frames at {native_fps:g} fps, protocol {self.name} needs {span}")
        number = int.from_bytes(hashlib.sha256(clip.encode()).digest()[:8], "big")
        start = number % (available - span + 1)
        return list(range(start, start + span, stride))

    def images(self, clips: Tensor, *, real: bool) -> Tensor:
        """Bring clips (B, T, 3, H, W) in [0, 255] to the size of the comparison; float32, not rounded yet.

        Raises ScoreError for a wrong number of frames, NaN, or values that look like [0, 1].
        """
        if clips.ndim != 5 or clips.shape[2] != 3:
            raise ScoreError(f"clips must have the shape (B, T, 3, H, W), got {tuple(clips.shape)}")
        if clips.shape[1] != self.frames:
            raise ScoreError(f"clips have {clips.shape[1]} frames, protocol {self.name} takes {self.frames}")
        check_range(clips)
        pixels = clips.float()
        for step in self.real_steps if real else self.steps:
            pixels = crop(pixels, step) if isinstance(step, Crop) else resize(pixels, step)
        return pixels

    def detector_input(self, images: Tensor) -> Tensor:
        """Return the network's input for `images` (B, T, 3, H, W) in 0..255: resized as it needs them, rounded once."""
        if not self.net.rounds:
            images = self.rounded(images).float()
        for step in self.net.input:
            images = resize(images, step)
        return self.rounded(images) if self.net.rounds else images

    def rounded(self, images: Tensor) -> Tensor:
        """Convert to uint8 by the protocol's rounding rule."""
        images = images.clamp(0, 255)
        return (images.round() if self.rounding == "half-even" else images.floor()).to(torch.uint8)


def _said(value: object) -> str:
    """Return a value as it stands in a protocol's name."""
    if isinstance(value, FeatureNet):
        pinned = value.sha256 not in (None, I3D_TORCHSCRIPT_SHA256)
        return f"{value.name}:{str(value.sha256)[:8]}" if pinned else value.name
    if isinstance(value, tuple):
        sizes = (f"{step.height}" if step.width is None else f"{step.height}x{step.width}" for step in value)
        return ">".join(sizes) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_range(clips: Tensor) -> None:
    """Raise ScoreError for NaN, for values outside [0, 255], and for values that look like [0, 1].

    The last is a common mistake; it makes a Fréchet distance of several thousand.
    """
    values = clips.float()
    if not torch.isfinite(values).all():
        raise ScoreError("clips contain NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    if low < -0.5 or high > 255.5:
        raise ScoreError(f"pixel values run from {low:.3g} to {high:.3g}, expected 0..255")
    if high <= 1.0 and high > 0.0 and (clips.is_floating_point() or bool((values != 0).float().mean() > 0.01)):
        raise ScoreError(f"the largest pixel value is {high:.3g}: these look like [0, 1], expected 0..255")


def resize(pixels: Tensor, step: Resize) -> Tensor:
    """Resize clips (B, T, C, H, W), float."""
    batch, frames, channels, height, width = pixels.shape
    target = step.target(height, width)
    if target == (height, width):
        return pixels
    flat = pixels.reshape(batch * frames, channels, height, width)
    if step.legacy:
        flat = _legacy_bilinear(flat, target)
    else:
        flat = functional.interpolate(flat, size=target, mode="bilinear", align_corners=False, antialias=step.antialias)
    return flat.reshape(batch, frames, channels, *target)


def _legacy_bilinear(images: Tensor, target: tuple[int, int]) -> Tensor:
    """Resize (N, C, H, W) as TensorFlow 1 did: source = index · in/out, neighbours clamped at the border."""
    for axis, size in ((2, target[0]), (3, target[1])):
        available = images.shape[axis]
        position = torch.arange(size, dtype=torch.float32, device=images.device) * (available / size)
        low = position.floor().long().clamp(max=available - 1)
        high = (low + 1).clamp(max=available - 1)
        weight = (position - low).reshape([-1 if a == axis else 1 for a in range(4)])
        images = images.index_select(axis, low) * (1 - weight) + images.index_select(axis, high) * weight
    return images


def crop(pixels: Tensor, step: Crop) -> Tensor:
    """Crop the centre of (B, T, C, H, W); raises ScoreError when the image is smaller."""
    height, width = pixels.shape[-2:]
    if height < step.height or width < step.width:
        raise ScoreError(f"can't crop {height}×{width} to {step.height}×{step.width}")
    top, left = (height - step.height) // 2, (width - step.width) // 2
    return pixels[..., top : top + step.height, left : left + step.width]


def paper_steps(resized: tuple[int, int], cropped: tuple[int, int]) -> tuple[Resize | Crop, ...]:
    """Return the steps of generated clips (App. E.4): antialiased resize to `resized`, centre crop to `cropped`."""
    return Resize(*resized, antialias=True), Crop(*cropped)


def covering_steps(height: int, width: int) -> tuple[Resize | Crop, ...]:
    """Return the steps of real clips: scale to cover the size and crop; UCF-101 (240×320) stays as it is."""
    return Resize(height, width, antialias=True, cover=True), Crop(height, width)


def named_protocols() -> dict[str, EvalProtocol]:
    """Return the protocols in use for UCF-101, by name; all are published as "the FVD", yet differ by a factor."""
    legacy: tuple[Resize | Crop, ...] = (Resize(224, 224, legacy=True),)
    short_side: tuple[Resize | Crop, ...] = (Resize(224), Crop(224, 224))
    cdfvd: tuple[Resize | Crop, ...] = (Resize(256, antialias=True), Crop(256, 256))
    protocols = (
        EvalProtocol(
            "svd_ucf101_paper",
            "ucf101",
            I3D,
            paper_steps((240, 432), (240, 320)),
            covering_steps(240, 320),
            fps=25.0,
            real=OFFICIAL_CLIPS,
            generated=OFFICIAL_CLIPS,
        ),
        EvalProtocol("styleganv_2048_16f", "ucf101", I3D, (), (), real=2048, generated=2048),
        EvalProtocol("tf_original", "ucf101", I3D, legacy, legacy, ddof=1),
        EvalProtocol(
            "cdfvd_videomae", "ucf101", VIDEOMAE, cdfvd, cdfvd, rounding="truncate", real=2048, generated=2048
        ),
        EvalProtocol("junyaohu_crop", "ucf101", I3D, short_side, short_side, ddof=1),
    )
    return {protocol.name: protocol for protocol in protocols}
