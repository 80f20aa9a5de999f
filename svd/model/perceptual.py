"""Perceptual distances between images: LPIPS (Zhang et al. 2018) and shift-tolerant ST-LPIPS (Ghildyal, Liu 2022).

The weights of ST-LPIPS ship in the wheel `stlpips-pytorch`, so it works offline; LPIPS itself needs its published
files. The two numbers aren't comparable, and neither is ever reported as the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from stlpips_pytorch.stlpips import LPIPS as Network
from torch import Tensor, nn

from svd.core.errors import UserError
from svd.model.safetensors import read_tensors

Kind = Literal["stlpips-alex", "stlpips-vgg", "lpips-alex", "lpips-vgg"]
BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}


class Perceptual(nn.Module):
    """Distance of images in the feature space of a frozen network; differentiable in both arguments.

    weights: only for `lpips-*`: the files that together hold the backbone (torchvision's `features.*`) and the linear
    layers (`lin0.model.1.weight` … of the LPIPS release), .safetensors or .pth (read with weights_only). Raises
    UserError when they are missing or don't fit.
    """

    def __init__(self, kind: Kind = "stlpips-alex", weights: Sequence[str | Path] = ()) -> None:
        super().__init__()
        family, net = kind.split("-")
        self.kind = kind
        if family == "stlpips":
            self.network = Network(net=net, variant="shift_tolerant", verbose=False)
        else:
            self.network = Network(net=net, variant="vanilla", pretrained=False, verbose=False)
            _load(self.network, net, [Path(path) for path in weights], kind)
        self.requires_grad_(False).eval()

    def forward(self, first_NCHW: Tensor, second_NCHW: Tensor) -> Tensor:
        """Return the distance (N,) of images (N, 3, H, W) in [-1, 1]; H and W at least 32."""
        return self.network(first_NCHW, second_NCHW).flatten()

    def train(self, mode: bool = True) -> Perceptual:
        """Stay in evaluation mode: its dropout must never run."""
        return super().train(False)


def _load(network: nn.Module, net: str, files: list[Path], kind: str) -> None:
    if not files:
        raise UserError(
            f"{kind}: no weights given; name torchvision's {BACKBONES[net]} and the LPIPS release's v0.1/{net}.pth "
            "in 'perceptual_weights', or choose 'stlpips-alex', whose weights are installed"
        )
    state: dict[str, Tensor] = {}
    for path in files:
        state |= _read(path)
    slices = {name.split(".")[2]: name.rsplit(".", 1)[0] for name in network.state_dict() if name.startswith("net.")}
    renamed = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "features" and parts[1] in slices:
            key = f"{slices[parts[1]]}.{parts[2]}"
        renamed[key] = tensor
        if parts[0].startswith("lin") and parts[0][3:].isdigit():
            renamed[f"lins.{parts[0][3:]}.{'.'.join(parts[1:])}"] = tensor
    wanted = [name for name in network.state_dict() if not name.startswith("scaling_layer")]
    missing = [name for name in wanted if name not in renamed]
    if missing:
        names = ", ".join(str(path) for path in files)
        raise UserError(f"{kind}: {names} lack(s) {len(missing)} tensors, such as {missing[0]}")
    network.load_state_dict({name: renamed[name] for name in wanted}, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a .pth file without running any of its code."""
    if path.suffix == ".safetensors":
        return {key: lazy.load() for key, lazy in read_tensors(path).items()}
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it is named in 'perceptual_weights'") from None
    except Exception as error:  # torch raises many types for a file that isn't a plain state dict
        raise UserError(f"{path}: not a plain state dict: {str(error).splitlines()[0]}") from None
