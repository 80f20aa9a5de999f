"""Numbers that are to be finite, where they are written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from svd.core.errors import UserError


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity."""
    return [name for name, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()]


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError that names `what` and the first tensors of it that hold NaN or infinity, if any does."""
    if bad := not_finite(tensors):
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(f"{what}: NaN or infinity in {', '.join(bad[:3])}{more}; nothing is written")
