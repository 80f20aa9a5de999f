"""The memory of one device in a training, by part: what is kept between steps, and the peak within one."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from svd.config import TrainingConfig
from svd.model.unet import UNet
from svd.training.planning.step import Step

SINGLE = 4  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step.

    weights: of the U-Net. averages: of its trained weights. optimiser: its state. gradients: of all trained weights.
    autoencoder: frozen. activations: what the backward pass needs, copies of weights in half precision, buffers.
    exchange: gathered blocks (FSDP2, estimated), or the buckets in which gradients are summed (DDP).
    """

    weights: int
    averages: int
    optimiser: int
    gradients: int
    autoencoder: int
    activations: int
    exchange: int

    @property
    def total(self) -> int:
        """Return the sum of the parts."""
        return sum(asdict(self).values())


def measure_memory(step: Step, config: TrainingConfig, ranks: int, sharded: bool) -> Memory:
    """Return the memory by part; `sharded` over the ranks (FSDP2), or whole on each of them."""
    network, shards = step.network, ranks if sharded else 1
    trained = [p for p in network.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    size = 2 if config.precision == "bf16-true" else SINGLE
    exchange = _gathered(network, config) if sharded else count * size if ranks > 1 else 0
    return Memory(
        weights=size * sum(p.numel() for p in network.parameters()) // shards,
        averages=SINGLE * count // shards if config.ema_decay is not None else 0,
        optimiser=size * _moments(network, trained, config) // shards,
        gradients=size * count // shards,
        autoencoder=SINGLE * step.autoencoder,
        activations=step.activations,
        exchange=exchange,
    )


def _moments(network: UNet, trained: list[nn.Parameter], config: TrainingConfig) -> int:
    """Return how many numbers the optimiser keeps: Adam two a parameter, Muon one a number of a hidden matrix."""
    if config.optimizer == "adamw":
        return 2 * sum(p.numel() for p in trained)
    ends = {id(p) for layer in (network.conv_in, network.conv_out) for p in layer.parameters()}
    return sum(p.numel() * (1 if p.ndim > 1 and id(p) not in ends else 2) for p in trained)


def _gathered(network: UNet, config: TrainingConfig) -> int:
    """Estimate what FSDP2 holds beside the shards: the root, two blocks, a block's gradients, two of them summed."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in network.blocks()]
    root, largest = sum(p.numel() for p in network.parameters()) - sum(blocks), max(blocks)
    size = SINGLE if config.precision in ("32-true", "16-mixed") else 2
    return size * (root + 3 * largest) + 2 * SINGLE * largest
