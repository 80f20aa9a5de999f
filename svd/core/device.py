"""Which device networks run on, and errors of its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def pick_device() -> str:
    """Return `cuda` when there is a GPU, else `cpu`. Imports torch."""
    import torch  # here, because processes without networks import this module too

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Raise MemoryError where torch gets no memory outside the GPU: it has no class of its own for that."""
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError from None
        raise
