"""Our U-Net against diffusers' on the CPU, with equal weights, in one run:  python -m benchmarks.model [--repeats 5]

One thread, CPU seconds (so that other processes on the machine count little), the two models interleaved, best of the
repeats. 69 M parameters (64, 128, 256, 256), 14 frames, latents of 16 x 24. "step" is forward and backward. Every line
also says how far the outputs and the gradients of the two models are apart. Needs the `test` extra (diffusers).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor, nn

from svd.model.unet import UNet, UNetConfig

WIDTHS = (64, 128, 256, 256)
FRAMES, HEIGHT, WIDTH, CONTEXT = 14, 16, 24, 1024
GOALS = {("forward", 1): 1.15, ("forward", 77): 2.5, ("step", 1): 1.05, ("step", 77): 1.8}


@dataclass(frozen=True)
class Pair:
    """Two models with the same weights."""

    ours: UNet
    theirs: Any


def build() -> Pair:
    """Both models of the benchmark; norm_eps as diffusers has it."""
    theirs: Any = UNetSpatioTemporalConditionModel(
        in_channels=8,
        block_out_channels=WIDTHS,
        num_attention_heads=tuple(width // 64 for width in WIDTHS),
        cross_attention_dim=CONTEXT,
    )
    ours = UNet(UNetConfig(in_channels=8, block_out_channels=WIDTHS, cross_attention_dim=CONTEXT, ids=3, norm_eps=1e-6))
    ours.load_state_dict(theirs.state_dict())
    return Pair(ours, theirs)


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, noise level, context and ids of one clip."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, FRAMES, 8, HEIGHT, WIDTH, generator=generator)
    context = torch.randn(1, tokens, CONTEXT, generator=generator)
    return x, torch.tensor([0.3]), context, torch.tensor([[6.0, 127.0, 0.02]])


def forward(model: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
    """Inference."""
    with torch.no_grad():
        return first(model(*arguments))


def step(model: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
    """Forward and backward pass."""
    model.zero_grad(set_to_none=True)
    output = first(model(*arguments))
    output.square().mean().backward()
    return output.detach()


def first(output: Any) -> Tensor:
    """The tensor in a model's output."""
    return output if isinstance(output, Tensor) else output.sample


def cpu_seconds(work: Callable[[], Tensor]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def gradient_distance(pair: Pair) -> float:
    """Relative L2 distance of all gradients that matter."""
    theirs = dict(pair.theirs.named_parameters())
    difference = total = 0.0
    for name, parameter in pair.ours.named_parameters():
        if parameter.grad is not None:
            difference += (parameter.grad - theirs[name].grad).square().sum().item()
            total += theirs[name].grad.square().sum().item()
    return (difference / total) ** 0.5


def eps_distance(pair: Pair) -> float:
    """Relative L2 distance of our outputs with Stability's eps of GroupNorm, 1e-5, and with diffusers', 1e-6."""
    original = UNet(replace(pair.ours.config, norm_eps=1e-5))
    original.load_state_dict(pair.ours.state_dict())
    arguments = inputs(1)
    expected = forward(pair.ours, arguments)
    return ((forward(original, arguments) - expected).norm() / expected.norm()).item()


def compare(pair: Pair, work: Callable[[nn.Module, tuple[Tensor, ...]], Tensor], tokens: int, repeats: int) -> None:
    """Measure and print one line."""
    arguments = inputs(tokens)
    distance = (work(pair.ours, arguments) - work(pair.theirs, arguments)).abs().max().item()
    gradients = f"{gradient_distance(pair):.1e}" if work is step else "-"
    ours, theirs = [], []
    for _ in range(repeats):
        theirs.append(cpu_seconds(lambda: work(pair.theirs, arguments)))
        ours.append(cpu_seconds(lambda: work(pair.ours, arguments)))
    ratio, goal = min(theirs) / min(ours), GOALS[(work.__name__, tokens)]
    print(
        f"{work.__name__:8} {tokens:6} {min(theirs):10.2f} {min(ours):7.2f} {ratio:6.2f}x {goal:5.2f}x "
        f"{'met' if ratio >= goal else 'MISSED':7} {distance:8.1e} {gradients:>9}",
        flush=True,
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each model; the best one counts (default 5)")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pair = build()
    print(f"{sum(p.numel() for p in pair.ours.parameters()) / 1e6:.0f} M parameters, torch {torch.__version__}")
    print("work     tokens  diffusers    ours   ratio   goal         outputs  gradients")
    for work in (forward, step):
        for tokens in (1, 77):
            compare(pair, work, tokens, repeats)
    print(f"norm_eps 1e-5 as in the original instead of diffusers' 1e-6 moves the output by {eps_distance(pair):.1e}")


if __name__ == "__main__":
    main()
