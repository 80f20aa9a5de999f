"""A check that the generated views are in the order of the true ones.

An orbit that is off by one view, or runs backwards, costs several decibels and looks like a bad model. So every
evaluation tries all shifts in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.multiview.image_metrics import image_psnr

LIMIT = 1.0  # decibels; an order that is better by more than this is reported as a mistake


@dataclass(frozen=True)
class Alignment:
    """The order in which the views fit best. gain: in dB over the order as it is; shift: in views."""

    gain: float
    shift: int
    reversed: bool

    @property
    def ok(self) -> bool:
        """True when no other order is clearly better."""
        return self.gain <= LIMIT

    @property
    def message(self) -> str:
        """One line about a wrong order."""
        direction = "backwards" if self.reversed else "forwards"
        return f"views fit the truth {self.gain:.1f} dB better read {direction} and shifted by {self.shift}"


def pairwise_psnr(views: Tensor, truth: Tensor) -> NDArray[np.float64]:
    """Return the PSNR of every view with every true view, (V, V); both (V, 3, H, W) in [0, 1]."""
    rows = [image_psnr(view.expand_as(truth), truth) for view in views]
    return torch.stack(rows).double().numpy()


def best_alignment(matrix: NDArray[np.float64]) -> Alignment:
    """Find the best of all cyclic orders, from the pairwise PSNR (V, V) averaged over objects.

    View v is seen from azimuth 360 (v + 1) / V; a reversed orbit shows there the view of the negative azimuth.
    """
    count = len(matrix)
    index = np.arange(count)
    as_is = matrix[index, index].mean()
    found = Alignment(0.0, 0, False)
    for backwards in (False, True):
        order = (count - 2 - index) % count if backwards else index
        for shift in range(count):
            gain = float(matrix[index, (order + shift) % count].mean() - as_is)
            if gain > found.gain:
                found = Alignment(gain, shift, backwards)
    return found
