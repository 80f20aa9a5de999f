"""Where networks of curation run, and what they say when memory is short."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def pick_device() -> str:
    """`cuda` when there is a GPU, else `cpu`. Imports torch."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def told_memory() -> Iterator[None]:
    """Raises MemoryError where torch gets no memory outside the GPU: it has no class of its own for that."""
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError from None
        raise
