"""Single layers: temporal attention by backend, temporal convolution by form, GroupNorm with SiLU by form."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.harness import Machine, Results

BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
ON_CPU = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)  # there are no other kernels for it
GROUPS, EPS = 32, 1e-5


def randn(machine: Machine, *shape: int) -> Tensor:
    """Random activations."""
    return torch.randn(shape, device=machine.device, dtype=machine.dtype)


def attention(results: Results) -> None:
    """Self-attention over T frames at S positions: (S, heads, T, 64), strided as in the model and contiguous.

    Flash tiles have 64 or 128 rows, so 14 frames use little of them. A batch over 65,535 is what some kernels refuse.
    """
    machine = results.machine
    for frames, positions, heads in [(4, 96, 2)] if machine.toy else [(14, 9216, 5), (14, 2304, 10), (25, 9216, 5)]:
        case = f"temporal ({positions}, {heads}, {frames}, 64)"
        teraflops = 4 * positions * heads * frames**2 * 64 / 1e12
        strided = [randn(machine, frames, positions, heads, 64).permute(1, 2, 0, 3) for _ in range(3)]
        packed = [x.contiguous() for x in strided]
        for backend in BACKENDS if machine.device.type == "cuda" else ON_CPU:
            for layout, qkv in (("strided", strided), ("contiguous", packed)):
                results.measure("attention", case, f"{backend.name}, {layout}", attend(backend, qkv), teraflops)
        results.measure("attention", case, "copies to contiguous", copies(strided))
        if has_triton(machine):
            triton_attention(results, case, strided, teraflops)
    if not machine.toy:
        limit = [randn(machine, 73_728, 5, 14, 64) for _ in range(3)]
        for backend in BACKENDS[:3]:
            results.measure("attention", "batch of 73,728", backend.name, attend(backend, limit))


def has_triton(machine: Machine) -> bool:
    """Whether Triton kernels run here."""
    return machine.device.type == "cuda" and importlib.util.find_spec("triton") is not None


def triton_attention(results: Results, case: str, strided: list[Tensor], teraflops: float) -> None:
    """Rows of our kernel, which takes the model's tokens (1, T, S, C) as they are."""
    from svd.model.kernels.triton import launch_attend_frames

    heads = strided[0].shape[1]
    q, k, v = (x.permute(2, 0, 1, 3).flatten(2)[None] for x in strided)

    def fused() -> Tensor:
        return launch_attend_frames(q, k, v, heads)

    def exact() -> Tensor:
        return F.scaled_dot_product_attention(*(x.float() for x in strided)).permute(2, 0, 1, 3).flatten(2)[None]

    results.measure("attention", case, "Triton, strided", fused, teraflops)
    results.distance("attention", case, "Triton against float32", fused, exact)


def copies(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """What contiguous q, k and v cost."""
    return lambda: [x.contiguous() for x in tensors]


def attend(backend: SDPBackend, qkv: list[Tensor]) -> Callable[[], Tensor]:
    """One call with one backend alone."""

    def work() -> Tensor:
        with torch.no_grad(), sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*qkv)

    return work


def convolution(results: Results) -> None:
    """Kernel (3, 1, 1) over frames: 2-D convolution on tokens, 3-D convolutions, three matrix products."""
    machine = results.machine
    sizes = [(4, 96, 64)] if machine.toy else [(14, 9216, 320), (14, 2304, 640), (14, 576, 1280)]
    for frames, positions, channels in sizes:
        tokens = randn(machine, 1, frames, positions, channels)
        weight, bias = randn(machine, channels, channels, 3, 1, 1), randn(machine, channels)
        case = f"(1, {frames}, {positions}, {channels})"
        teraflops = 6 * frames * positions * channels**2 / 1e12
        variants = {
            "conv2d (3,1), channels last": conv2d(tokens, weight, bias),
            "conv3d, NCDHW": conv3d(tokens, weight, bias, torch.contiguous_format),
            "conv3d, NDHWC": conv3d(tokens, weight, bias, torch.channels_last_3d),
            "3 GEMMs": gemms(tokens, weight, bias),
        }
        expected = variants["conv2d (3,1), channels last"]().permute(0, 2, 3, 1).float()
        assert (variants["3 GEMMs"]().float() - expected).norm() < 0.02 * expected.norm()
        for name, work in variants.items():
            results.measure("conv", case, name, work, teraflops)


def conv2d(tokens: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """As in the model: a view of the tokens."""
    image, kernel = tokens.permute(0, 3, 1, 2), weight.squeeze(-1)
    return lambda: F.conv2d(image, kernel, bias, padding=(1, 0))


def conv3d(tokens: Tensor, weight: Tensor, bias: Tensor, layout: torch.memory_format) -> Callable[[], Tensor]:
    """As in diffusers, in either layout; the time to bring tokens into the layout is not counted."""
    video = tokens.permute(0, 3, 1, 2)[..., None].contiguous(memory_format=layout)
    kernel = weight.contiguous(memory_format=layout)
    return lambda: F.conv3d(video, kernel, bias, padding=(1, 0, 0))


def gemms(tokens: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """One matrix product for each tap, accumulated in shifted views of the output."""
    before, now, after = (weight[:, :, tap, 0, 0].T for tap in range(3))

    def work() -> Tensor:
        out = F.linear(tokens, now.T, bias)
        frames, channels = tokens.shape[1], tokens.shape[-1]
        if frames > 1:
            out[:, 1:].view(-1, channels).addmm_(tokens[:, :-1].reshape(-1, channels), before)
            out[:, :-1].view(-1, channels).addmm_(tokens[:, 1:].reshape(-1, channels), after)
        return out

    return work


def normalisation(results: Results) -> None:
    """GroupNorm and SiLU of tokens: eager in both layouts, compiled, and in Triton."""
    full = [(14, 9216, 320), (1, 14 * 9216, 320), (14, 2304, 640), (25, 576 * 1024, 128)]
    for size in [(2, 96, 64)] if results.machine.toy else full:
        normalise(results, *size)


def normalise(results: Results, rows: int, positions: int, channels: int) -> None:
    """Rows of one size: (rows, positions, channels), spatial or, with one row, temporal."""
    machine, case = results.machine, f"({rows}, {positions}, {channels})"
    tokens, weight, bias = (randn(machine, *shape) for shape in ((rows, positions, channels), (channels,), (channels,)))
    first, last = tokens.transpose(1, 2).contiguous(), tokens.transpose(1, 2)[..., None]
    torch._dynamo.reset()
    fused = torch.compile(norm_silu, backend=machine.backend)
    results.measure("norm", case, "eager, NCHW", lambda: norm_silu(first, weight, bias))
    results.measure("norm", case, "eager, channels last", lambda: norm_silu(last, weight, bias))
    results.measure("norm", case, "compiled, channels last", lambda: fused(last, weight, bias))
    if has_triton(machine):
        from svd.model.kernels.triton import launch_group_norm

        def ours() -> Tensor:
            return launch_group_norm(tokens, weight, bias, GROUPS, EPS, True)[0]

        def eager() -> Tensor:
            return norm_silu(last, weight, bias)[..., 0].transpose(1, 2)

        results.measure("norm", case, "Triton", ours)
        results.distance("norm", case, "Triton against eager", ours, eager)


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The two layers before every convolution of a residual block."""
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))
