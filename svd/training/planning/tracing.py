"""Count what a piece of code would allocate and compute, by running it on `meta` tensors, which hold no data."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from svd.model.kernels import operators


class Ledger(TorchDispatchMode):
    """Counts the bytes of storages made within the block that are alive, their peak, and floating-point operations.

    A multiplication and an addition are two operations; only products of matrices, convolutions and attention count,
    as in torch's own counter. What was made before the block is not counted, and neither are the buffers that a kernel
    makes for itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()

    def ignore(self, *tensors: Tensor) -> None:
        """Leave out the storages of tensors that were made before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def restart_peak(self) -> None:
        """Look for a new peak from now on."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._enter(value.untyped_storage())
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


HALF = (F.linear, F.conv2d, torch.matmul, torch.bmm)


class DeviceRules(TorchFunctionMode):
    """Makes `meta` tensors follow the rules of a device that decide about memory: autocast, attention, normalisation.

    `meta` has no autocast, computes attention with its whole matrix of weights, which no device does, and copies what
    it normalises. mixed: the type that autocast computes in, or None without autocast. gpu: layer normalisation is in
    float32 under autocast, as on CUDA; a CPU leaves it in the type of its input.
    """

    def __init__(self, mixed: torch.dtype | None, gpu: bool) -> None:
        super().__init__()
        self.mixed, self.gpu = mixed, gpu
        self._cast: dict[int, tuple[Tensor, Tensor]] | None = {}

    def end_forward(self) -> None:
        """Drop the copies of weights that autocast keeps until then; what is recomputed later keeps none."""
        self._cast = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (self._lower(tensor) for tensor in args[:3])
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        if func is F.group_norm:
            return self._group_norm(*args, **kwargs)
        if self.mixed is not None and func in HALF:
            args = tuple(self._lower(value) for value in args)
            kwargs = {name: self._lower(value) for name, value in kwargs.items()}
        elif self.mixed is not None and self.gpu and func is F.layer_norm:
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        """Cast as autocast does: float tensors, with a copy kept of each weight."""
        if self.mixed is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if self._cast is None or not (value.is_leaf and value.requires_grad and torch.is_grad_enabled()):
            return value.to(self.mixed)
        if id(value) not in self._cast:
            self._cast[id(value)] = (value, value.to(self.mixed))
        return self._cast[id(value)][1]

    @staticmethod
    def _group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Normalise (n, C, a, b) in channels-last memory, where our tokens lie, without a copy."""
        tokens = x.permute(0, 2, 3, 1).contiguous()
        return operators.group_norm(tokens, weight, bias, num_groups, eps, False)[0].permute(0, 3, 1, 2)


def run_backward(loss: Tensor) -> None:
    """Do as `loss.backward()`, with the rules in force for what is recomputed too: torch suspends them in its own."""
    engine = torch.autograd.Variable._execution_engine
    ones = torch.ones_like(loss)
    engine.run_backward((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


@contextmanager
def kernels_of_gpu() -> Iterator[None]:
    """Run our operators as on a GPU: there a normalisation with its SiLU is one kernel, which keeps less."""
    before = operators.fits
    names: dict[str, Any] = vars(operators)  # where the module's functions look it up when they are called
    names["fits"] = lambda x: x.is_meta
    try:
        yield
    finally:
        names["fits"] = before
