"""The networks, ours against diffusers: forward, training step, sampling, decoding, memory by checkpoint policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.harness import Machine, Results, Row, failure, peer
from svd.diffusion.edm import denoiser
from svd.diffusion.guidance import Condition, guided, linear
from svd.diffusion.sampler import karras_sigmas, sample
from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.unet import UNet, UNetConfig

FULL = UNetConfig(in_channels=8, ids=3, norm_eps=1e-6)
TOY = replace(
    FULL, block_out_channels=(32, 64), attention_levels=(True, False), head_channels=16, cross_attention_dim=32
)


@dataclass(frozen=True)
class Clip:
    """A size of clip: frames, pixels, context tokens, clips in a batch."""

    frames: int
    height: int
    width: int
    tokens: int = 1
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.batch}x{self.frames}x{self.height}x{self.width}, {self.tokens} token(s)"


VARIANTS = ("ours, eager", "diffusers, eager", "diffusers, compiled", "ours, compiled")
THEIRS = [name for name in VARIANTS if name.startswith("diffusers")]
TOP = 16  # kernels that a profile lists
SMALL, LARGE = Clip(14, 320, 576), Clip(14, 576, 1024)
XT = Clip(25, 576, 1024)


def sized(machine: Machine, clip: Clip) -> Clip:
    """The clip, or for a toy run one of the same kind that a CPU can do."""
    return replace(clip, frames=min(clip.frames, 4), height=64, width=96) if machine.toy else clip


def unet_config(machine: Machine) -> UNetConfig:
    """Full size or toy size."""
    return TOY if machine.toy else FULL


def inputs(config: UNetConfig, clip: Clip, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random latents with conditioning, noise level, context, ids."""
    shape = (clip.batch, clip.frames, config.in_channels, clip.height // 8, clip.width // 8)
    x = torch.randn(shape, device=device, dtype=dtype)
    context = torch.randn(clip.batch, clip.tokens, config.cross_attention_dim, device=device, dtype=dtype)
    ids = torch.tensor([[6.0, 127.0, 0.02]], device=device).expand(clip.batch, -1)
    return x, torch.full((clip.batch,), 0.3, device=device), context, ids


@cache
def forward_teraflops(config: UNetConfig, clip: Clip) -> float:
    """Counted work of our forward pass; the rates of both implementations are in these useful operations."""
    meta = torch.device("meta")
    with meta:
        unet = UNet(config).bfloat16()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*inputs(config, clip, meta, torch.bfloat16))
    return counter.get_total_flops() / 1e12


def our_unet(machine: Machine, **changes: Any) -> UNet:
    """Random weights without the zeros of a fresh model, which would make the outputs constant."""
    torch.manual_seed(0)
    with machine.device:
        unet = UNet(replace(unet_config(machine), **changes))
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return unet.to(machine.dtype)


def their_unet(machine: Machine, weights: dict[str, Tensor]) -> Any | None:
    """diffusers' model with our weights, or None where there is no diffusers."""
    diffusers, config = peer(), unet_config(machine)
    if diffusers is None:
        return None
    cross, plain = "CrossAttn{}BlockSpatioTemporal", "{}BlockSpatioTemporal"
    with machine.device:
        unet: Any = diffusers.UNetSpatioTemporalConditionModel(
            in_channels=config.in_channels,
            block_out_channels=config.block_out_channels,
            down_block_types=tuple((cross if has else plain).format("Down") for has in config.attention_levels),
            up_block_types=tuple((cross if has else plain).format("Up") for has in config.attention_levels[::-1]),
            num_attention_heads=tuple(width // config.head_channels for width in config.block_out_channels),
            cross_attention_dim=config.cross_attention_dim,
        )
    unet.to(machine.device, machine.dtype).load_state_dict(weights)
    return unet


def tensor(output: Any) -> Tensor:
    """The tensor in a model's output."""
    return output if isinstance(output, Tensor) else output.sample


def compiled(machine: Machine, model: nn.Module) -> Callable[..., Any]:
    """Our U-Net block by block (few shapes, minutes saved), other models as a whole."""
    torch._dynamo.reset()
    if not isinstance(model, UNet):
        return torch.compile(model, backend=machine.backend)
    model.compile_blocks(backend=machine.backend)
    return model


def contestants(machine: Machine, **changes: Any) -> Iterator[tuple[str, Callable[..., Any], nn.Module]]:
    """(name, callable, module) of each U-Net, one at a time so that one alone is in memory beside the weights."""
    ours = our_unet(machine, **changes)
    theirs = None if {*THEIRS} <= {*machine.without} else their_unet(machine, ours.state_dict())
    for name in VARIANTS:
        model = ours if name.startswith("ours") else theirs
        if model is not None and name not in machine.without:
            yield name, compiled(machine, model) if name.endswith("compiled") else model, model


def compare(results: Results, section: str, case: str) -> None:
    """The ratios that have goals."""
    results.ratio(section, case, "diffusers, eager", "ours, compiled", 1.5)
    results.ratio(section, case, "diffusers, eager", "ours, eager")
    results.ratio(section, case, "diffusers, compiled", "ours, compiled", 1.15)


def forward(results: Results) -> None:
    """One forward pass without gradients, and how far bf16 is from float32."""
    machine = results.machine
    clips = [sized(machine, clip) for clip in (SMALL, LARGE, replace(LARGE, tokens=77))]
    for name, run, module in contestants(machine):
        for clip in dict.fromkeys(clips):
            arguments = inputs(unet_config(machine), clip, machine.device, machine.dtype)
            work = torch.no_grad()(lambda run=run, arguments=arguments: run(*arguments))
            results.measure("forward", str(clip), name, work, forward_teraflops(unet_config(machine), clip))
        if name == "ours, eager":
            precision(results, module, clips[0])
    for clip in dict.fromkeys(clips):
        compare(results, "forward", str(clip))


@torch.no_grad()
def precision(results: Results, unet: nn.Module, clip: Clip) -> None:
    """Relative L2 distance between the output in the benchmark's precision and in float32."""
    machine = results.machine
    x, c_noise, context, ids = inputs(unet_config(machine), clip, machine.device, machine.dtype)
    got = unet(x, c_noise, context, ids).float()
    expected = copy.deepcopy(unet).float()(x.float(), c_noise, context.float(), ids)
    distance = ((got - expected).norm() / expected.norm()).item()
    results.add(Row("forward", str(clip), f"{machine.dtype} against float32", note=f"relative distance {distance:.1e}"))


def train(results: Results) -> None:
    """Forward, backward and fused AdamW. MFU counts three forward passes."""
    machine = results.machine
    sizes = (SMALL, replace(SMALL, batch=4), replace(SMALL, tokens=77), LARGE)
    clips = [sized(machine, clip) for clip in sizes]
    for name, run, module in contestants(machine):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
        for clip in dict.fromkeys(clips):
            arguments = inputs(unet_config(machine), clip, machine.device, machine.dtype)

            def step(run=run, arguments=arguments, optimizer=optimizer) -> None:  # type: ignore[no-untyped-def]
                tensor(run(*arguments)).float().square().mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            results.measure("train", str(clip), name, step, 3 * forward_teraflops(unet_config(machine), clip))
            optimizer.zero_grad(set_to_none=True)
        del optimizer
    for clip in dict.fromkeys(clips):
        compare(results, "train", str(clip))


def memory(results: Results) -> None:
    """Peak memory of forward and backward by checkpoint policy (notes: 61.1 GiB, -, 2.6 kept at 14x576x1024)."""
    machine = results.machine
    for policy in ("none", "fine", "all"):
        unet = our_unet(machine, checkpointing=policy)
        backward(results, f"ours, {policy}", unet)
        del unet
    theirs = their_unet(machine, our_unet(machine).state_dict())
    if theirs is not None:
        theirs.enable_gradient_checkpointing()
        backward(results, "diffusers, its checkpointing", theirs)


def backward(results: Results, variant: str, unet: nn.Module) -> None:
    """Rows of one policy at every size."""
    machine = results.machine
    for clip in dict.fromkeys(sized(machine, clip) for clip in (SMALL, LARGE, XT)):
        arguments = inputs(unet_config(machine), clip, machine.device, machine.dtype)

        def work(arguments: tuple[Tensor, ...] = arguments) -> None:
            unet.zero_grad(set_to_none=True)
            tensor(unet(*arguments)).float().square().mean().backward()

        results.measure("memory", str(clip), variant, work)
        unet.zero_grad(set_to_none=True)


def sampling(results: Results) -> None:
    """SVD-XT: 25 frames, 576x1024, 25 Euler steps with linear guidance. Goal on an H200: 8.0 s."""
    machine, config = results.machine, unet_config(results.machine)
    clip, steps = sized(machine, XT), 2 if machine.toy else 25
    x, _, context, ids = inputs(config, clip, machine.device, torch.float32)
    noise, concat = x[:, :, :4], x[:, :, 4:]
    cond = Condition(context, ids, concat)
    uncond = Condition(torch.zeros_like(context), ids, torch.zeros_like(concat))
    case = f"{clip.frames} frames, {steps} steps, CFG"
    for name, run, _ in contestants(machine):

        def denoise(x: Tensor, sigma: Tensor, condition: Condition, run: Callable[..., Any] = run) -> Tensor:
            def network(x: Tensor, c_noise: Tensor) -> Tensor:
                x = torch.cat([x, condition.concat], dim=2).to(machine.dtype)
                return tensor(run(x, c_noise, condition.context.to(machine.dtype), condition.ids))

            return denoiser(network)(x, sigma)

        scale = linear(1.0, 3.0, clip.frames).to(machine.device)
        both = guided(denoise, cond, uncond, scale, "batched")
        work, warm_up = (
            torch.no_grad()(lambda both=both, n=n: sample(both, noise, karras_sigmas(n))) for n in (steps, 2)
        )
        results.measure("sampling", case, name, work, 2 * steps * forward_teraflops(config, clip), warm_up)
    compare(results, "sampling", case)


def decode(results: Results) -> None:
    """The temporal decoder on 25 frames, whole and in chunks. Goal on an H200: 0.45 s."""
    machine = results.machine
    clip = sized(machine, XT)
    widths = (32, 32, 64, 64) if machine.toy else (128, 256, 512, 512)
    torch.manual_seed(0)
    with machine.device:
        ours = Autoencoder(AutoencoderConfig(block_out_channels=widths)).to(machine.dtype)
    shape = (1, clip.frames, 4, clip.height // 8, clip.width // 8)
    latents = torch.randn(shape, device=machine.device, dtype=machine.dtype)
    case = f"{clip.frames}x{clip.height}x{clip.width}"
    wanted = [name for name in VARIANTS if name not in machine.without]
    if "ours, eager" in wanted:
        for chunk in (None, 14, 7):
            work = torch.no_grad()(lambda chunk=chunk: ours.decode(latents, chunk))
            results.measure("decode", case, "ours, eager" if chunk is None else f"ours, eager, chunk {chunk}", work)
        profile(results, case, "ours, eager, chunk 14", lambda: ours.decode(latents, 14))
    theirs = their_decoder(machine, widths, ours) if {*THEIRS} & {*wanted} else None
    if theirs is not None:
        decode_theirs(results, case, theirs, latents, wanted)
    if "ours, compiled" in wanted:
        torch._dynamo.reset()
        ours.decoder.compile(backend=machine.backend)
        results.measure("decode", case, "ours, compiled", torch.no_grad()(lambda: ours.decode(latents)))
    compare(results, "decode", case)


def decode_theirs(results: Results, case: str, theirs: Any, latents: Tensor, wanted: Collection[str]) -> None:
    """Rows of diffusers' decoder."""
    machine, flat, frames = results.machine, latents[0], latents.shape[1]
    if "diffusers, eager" in wanted:
        work = torch.no_grad()(lambda: theirs.decode(flat, num_frames=frames))
        results.measure("decode", case, "diffusers, eager", work)
    if "diffusers, compiled" in wanted:
        decoder = torch.compile(theirs.decoder, backend=machine.backend)
        indicator = torch.zeros(1, frames, device=machine.device, dtype=machine.dtype)
        work = torch.no_grad()(lambda: decoder(flat, num_frames=frames, image_only_indicator=indicator))
        results.measure("decode", case, "diffusers, compiled", work)


def profiles(results: Results) -> None:
    """Where the time of one forward pass goes, of each variant of ours."""
    machine = results.machine
    clip = sized(machine, XT)
    arguments = inputs(unet_config(machine), clip, machine.device, machine.dtype)
    for name, run, _ in contestants(replace(machine, without=[*machine.without, *THEIRS])):
        profile(results, str(clip), name, lambda run=run: run(*arguments))


@torch.no_grad()
def profile(results: Results, case: str, variant: str, work: Callable[[], Any]) -> None:
    """Rows of the kernels (on a CPU: operations) that take most of the time of the second of two runs; errors as in
    `Results.measure`.
    """
    cuda = results.machine.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    try:
        work()
        with torch.profiler.profile(activities={kind}) as profiler:
            work()
            results.machine.synchronize()
    except Exception as error:  # compilers of versions yet unseen fail with anything
        results.add(Row("profile", case, variant, note=failure(error)))
        return
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in profiler.key_averages()
    }
    total = max(sum(times.values()), 1e-9)
    for name, time in sorted(times.items(), key=lambda item: -item[1])[:TOP]:
        results.add(Row("profile", case, variant, time / 1e3, note=f"{time / total:.1%} {name[:100]}"))


def their_decoder(machine: Machine, widths: tuple[int, ...], ours: Autoencoder) -> Any | None:
    """diffusers' autoencoder with our weights, or None where there is no diffusers."""
    diffusers = peer()
    if diffusers is None:
        return None
    with machine.device:
        theirs: Any = diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=widths, layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * len(widths)
        )
    theirs.to(machine.device, machine.dtype).load_state_dict(ours.state_dict())
    return theirs
