"""The exponential moving average of the trained weights, on whole and on sharded parameters (§3: decay 0.9999)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Ema(nn.Module):
    """float32 averages of a model's trainable parameters, kept as frozen parameters of their own.

    They are saved and restored with the module that holds them, in sharded checkpoints too, which a callback's state
    is not. The number of updates is not stored: it follows from the step.
    """

    def __init__(self, model: nn.Module, decay: float, every: int = 1) -> None:
        super().__init__()
        self.decay = decay
        self.every = every
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                average = nn.Parameter(parameter.detach().float().clone(), requires_grad=False)
                self.register_parameter(name.replace(".", "/"), average)
                self._pairs.append((parameter, average))
        # The model is reached through the list: as a submodule its weights would be saved twice.
        self._model = (model,)

    def _refresh(self) -> None:
        """Pair anew with the model's parameters: moving to another device may have replaced them."""
        current = dict(self._model[0].named_parameters())
        self._pairs = [(current[name.replace("/", ".")], average) for name, average in self.named_parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step` (counted from 1), every `every` steps.

        Warm-up as in the released code: the decay at update n is min(decay, (1 + n) / (10 + n)), to the power of
        `every`.
        """
        if step % self.every:
            return
        n = step // self.every
        decay = min(self.decay, (1 + n) / (10 + n)) ** self.every
        self._refresh()
        averages = [_local(average) for _, average in self._pairs]
        current = [
            _local(parameter).to(average.dtype) for (parameter, _), average in zip(self._pairs, averages, strict=True)
        ]
        torch._foreach_lerp_(averages, current, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the model the averaged weights within the block."""
        self._refresh()
        kept = [_local(parameter).detach().clone() for parameter, _ in self._pairs]
        self._assign([_local(average) for _, average in self._pairs])
        try:
            yield
        finally:
            self._assign(kept)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        torch._foreach_copy_([_local(parameter) for parameter, _ in self._pairs], values)
        for module in self._model[0].modules():
            # A gathered copy of the old values may be left from a forward pass without a backward one.
            if isinstance(module, FSDPModule):
                module.reshard()
