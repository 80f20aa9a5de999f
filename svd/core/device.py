"""The device that networks run on, and torch's lack of memory as MemoryError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def pick_device() -> str:
    """Return `cuda` when there is a GPU, else `cpu`. Imports torch."""
    import torch  # here: processes without networks do without torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Raise MemoryError where torch gets no memory outside the GPU: torch has no class of its own for that."""
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError from None
        raise
