"""One step of a training phase on `meta` tensors: what it computes and what it keeps in memory on one device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svd.config import Phase, Preset, TrainingConfig
from svd.config.training import LoraConfig
from svd.latents.loader import Batch
from svd.model.autoencoder import Autoencoder
from svd.model.lora import add_lora
from svd.model.split import Split
from svd.model.unet import UNet
from svd.tasks.base import Task
from svd.training.initialise import autoencoder_config, unet_config, with_checkpointing
from svd.training.module import Diffusion, select_parameters
from svd.training.planning.tracing import DeviceRules, Ledger, kernels_of_gpu, run_backward

MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
TEXT_TOKENS = 77  # of CLIP


@dataclass(frozen=True)
class Shape:
    """How a step is computed on one device.

    clips: per forward pass. context_ranks: devices that share each of them; this is the first one, which has most of
    an uneven share. accumulates: gradients of several passes are summed. sharded: weights are gathered in half
    precision for each block, and gradients leave it at once (FSDP2). gpu: with the rules and kernels of a GPU.
    """

    clips: int
    context_ranks: int = 1
    accumulates: bool = False
    checkpointing: str = "none"
    sharded: bool = False
    gpu: bool = True


@dataclass(frozen=True)
class Step:
    """What was counted.

    flops: floating-point operations of a forward and a backward pass on one device, recomputation included.
    activations: bytes at the peak beside weights and gradients: what the backward pass needs, copies of weights in
    half precision, buffers. network: the U-Net as it trains, on `meta`. autoencoder: parameters of the frozen one.
    """

    flops: int
    activations: int
    network: UNet
    autoencoder: int


def build_module(preset: Preset, task: Task, config: TrainingConfig, phase: Phase, checkpointing: str) -> Diffusion:
    """Build what a training stage trains, on `meta`: the U-Net, its trainable part chosen, and the autoencoder."""
    with torch.device("meta"):
        autoencoder = Autoencoder(autoencoder_config(preset)).requires_grad_(False)
        size = phase.height // autoencoder.factor, phase.width // autoencoder.factor
        unet = with_checkpointing(UNet(unet_config(preset, task, size)), checkpointing)
        module = Diffusion(unet, task, config, phase, autoencoder, _chooser(task, config, phase)).to("meta")
        module.configure_model()
    return module


def _chooser(task: Task, config: TrainingConfig, phase: Phase) -> Callable[[UNet], None]:
    if isinstance(config, LoraConfig):
        tokens = 1 if task.one_token else TEXT_TOKENS
        return lambda unet: add_lora(unet, config.rank, config.alpha, "plan", context_tokens=tokens)
    return lambda unet: select_parameters(unet, task, phase.trainable)


def make_batch(preset: Preset, task: Task, phase: Phase, clips: int) -> Batch:
    """Make a batch of `clips` as `svd.latents.loader.Examples` does, on `meta`."""
    factor = 2 ** (len(preset.model.autoencoder.block_out_channels) - 1)
    latent = phase.frames, preset.model.autoencoder.latent_channels, phase.height // factor, phase.width // factor
    width = preset.model.unet.cross_attention_dim
    tokens = preset.encoders.toy_tokens if preset.encoders.kind == "toy-clip" else TEXT_TOKENS
    text = (phase.frames, tokens, width) if phase.image_share else (tokens, width)
    shapes: dict[str, tuple[int, ...]] = {"latents": latent, "noise": latent, "text": text}
    shapes |= {"image": (phase.frames, width)}
    scalars = ("sigma", "scaling_factor", "keep_image", "keep_concat", "conditioning_sigma")
    shapes |= dict.fromkeys((*scalars, "fps", "motion_bucket", "elevation"), ())
    if task.pixels:
        shapes |= dict.fromkeys(("frame", "frame_noise"), (3, phase.height, phase.width))
    else:
        shapes |= {"latent_noise": (2, *latent[1:])}
    batch = {name: torch.empty(clips, *shape, device="meta") for name, shape in shapes.items()}
    batch["index"] = torch.empty(clips, dtype=torch.int64, device="meta")
    if phase.image_share:
        batch["image_only"] = torch.empty(clips, dtype=torch.bool, device="meta")
    return batch


def trace_step(preset: Preset, task: Task, config: TrainingConfig, phase: Phase, shape: Shape) -> Step:
    """Run one step as the trainer does once it is under way, and count.

    The gradients of the step before are there until the backward pass begins, because Lightning drops them then. The
    optimiser's own buffers aren't counted: they come when the activations are gone.
    """
    module = build_module(preset, task, config, phase, shape.checkpointing)
    network, frozen = module.unet, module.autoencoder
    network.split = Split(ranks=shape.context_ranks)
    half = config.precision == "bf16-true"
    if half or (shape.sharded and config.precision == "bf16-mixed"):
        network.bfloat16()
    trainable = [p for p in network.parameters() if p.requires_grad]
    ledger, rules = Ledger(), DeviceRules(MIXED.get(config.precision), shape.gpu)
    ledger.ignore(*network.parameters(), *network.buffers(), *_leave_gradients(trainable, shape))
    if frozen is not None:
        ledger.ignore(*frozen.parameters())
    with kernels_of_gpu() if shape.gpu else nullcontext(), ledger, rules:
        batch = make_batch(preset, task, phase, shape.clips)
        if half:
            batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
        loss = module.losses(batch).mean()
        rules.end_forward()
        forward_peak = ledger.peak
        ledger.restart_peak()
        run_backward(loss)
    made = 0 if shape.sharded or shape.accumulates else sum(p.numel() * p.element_size() for p in trainable)
    activations = max(forward_peak, ledger.peak - made)
    return Step(ledger.flops, activations, network, sum(p.numel() for p in frozen.parameters()) if frozen else 0)


def _leave_gradients(trainable: list[nn.Parameter], shape: Shape) -> list[Tensor]:
    """Prepare where gradients go: nowhere when sharded, into those of earlier passes when these are summed."""
    if shape.sharded:
        for parameter in trainable:
            parameter.register_post_accumulate_grad_hook(_drop)
        return []
    if not shape.accumulates:
        return []
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter)
    return [parameter.grad for parameter in trainable if parameter.grad is not None]


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
