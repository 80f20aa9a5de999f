"""Orthogonalised momentum (Muon; Jordan et al. 2024) for the matrices of a network, Adam for the rest.

Each weight matrix moves along the orthogonal matrix nearest to its momentum, so that all directions learn equally fast.
For an autoencoder trained from nothing in a few hundred steps this needs less than half of Adam's steps for the same
error; for fine-tuning released weights Adam stays the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

# Coefficients of the quintic Newton-Schulz iteration: steepest at zero while singular values stay in about [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
ADAM_EPS = 1e-8


def orthogonalised(matrix: Tensor) -> Tensor:
    """Approximate U·Vᵀ of the singular value decomposition U·S·Vᵀ of a (rows, columns) matrix X.

    Every iteration multiplies X from the left by a polynomial of its Gram matrix G = X·Xᵀ. The short side being at most
    half of the long one, it is cheaper to iterate on G, which stays small, and to multiply X once by the product.
    """
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if tall else matrix
    x = x / (x.norm() + 1e-7)
    if 2 * x.shape[0] <= x.shape[1]:
        x = _product_of_polynomials(x @ x.t()) @ x
    else:
        for _ in range(ITERATIONS):
            gram = x @ x.t()
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x.t() if tall else x


def _product_of_polynomials(gram: Tensor) -> Tensor:
    """Return the product of all iterations' polynomials, (n, n), from X·Xᵀ alone: the factors commute."""
    a, b, c = QUINTIC
    total = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for iteration in range(ITERATIONS):
        factor = b * gram + c * gram @ gram
        factor.diagonal().add_(a)
        total = factor @ total if iteration else factor
        gram = factor @ gram @ factor
    return total


def _whole(tensor: Tensor) -> Tensor:
    """Gather a matrix whose rows lie on several ranks: the orthogonal matrix nearest to a part of it is another one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return this rank's part of `value`, which all ranks hold, as `parameter` is sharded."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


class Muon(torch.optim.Optimizer):
    """Muon for weights of two and more dimensions (flattened behind the first), Adam for vectors and `others`.

    lr: step of the matrices, as a share of an orthogonal matrix; adam_lr: step of the rest. A matrix that FSDP2 shards
    is gathered for its step, which each rank computes.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        adam_lr: float,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.5, 0.9),
    ) -> None:
        every, excluded = list(parameters), {id(parameter) for parameter in others}
        matrices = [p for p in every if p.ndim > 1 and id(p) not in excluded]
        rest = [p for p in every if p.ndim <= 1 or id(p) in excluded]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "lr": lr, "matrices": True},
            {"params": rest, "lr": adam_lr, "matrices": False},
        ]
        super().__init__([g for g in groups if g["params"]], {"momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay as they are."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            update = self._matrix if group["matrices"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, group)
        return loss

    def _matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        ahead = _whole(parameter.grad.lerp(state["momentum"], group["momentum"])).flatten(1)
        scale = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
        step = orthogonalised(ahead).view(parameter.shape)
        parameter.add_(_sharded_like(parameter, step), alpha=-group["lr"] * scale)

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, "first": torch.zeros_like(parameter), "second": torch.zeros_like(parameter)}
        state["step"] += 1
        one, two = group["betas"]
        state["first"].lerp_(parameter.grad, 1 - one)
        state["second"].mul_(two).addcmul_(parameter.grad, parameter.grad, value=1 - two)
        first = state["first"] / (1 - one ** state["step"])
        second = state["second"] / (1 - two ** state["step"])
        parameter.addcdiv_(first, second.sqrt().add_(ADAM_EPS), value=-group["lr"])
