"""Where networks of curation run."""

from __future__ import annotations


def pick_device() -> str:
    """`cuda` when there is a GPU, else `cpu`. Imports torch."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
