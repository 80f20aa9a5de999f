"""Optical flow between sampled frames (§3.1, App. C): Farnebäck for all data, RAFT for the high-quality set.

Both map two images to a flow map. Scores use the length of each vector: a signed mean would cancel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from svd.config import MotionConfig
from svd.core.device import memory_errors, pick_device
from svd.core.errors import UserError

Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]
RAFT_SIZE = (800, 450)  # width, height (App. C)
RAFT_MULTIPLE = 8


def grid_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return (width, height) of an image scaled to a short side."""
    if width <= height:
        return short_side, max(short_side, round(height * short_side / width))
    return max(short_side, round(width * short_side / height)), short_side


def stored_flow(flow: np.ndarray, short_side: int) -> np.ndarray:
    """Scale a flow map (H, W, 2) to a short side: (h, w, 2) float16, with vectors in pixels of the new map."""
    height, width = flow.shape[:2]
    size = grid_size(width, height, short_side)
    small = cv2.resize(flow, size, interpolation=cv2.INTER_AREA)
    return (small * np.array([size[0] / width, size[1] / height], np.float32)).astype(np.float16)


def motion_score(flows: np.ndarray) -> float:
    """Return the mean length of the vectors of (P, h, w, 2) flow maps over time and space (§3.1); 0 without a map."""
    if not len(flows):
        return 0.0
    return float(np.sqrt((flows.astype(np.float32) ** 2).sum(-1)).mean())


def farneback(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Compute dense Farnebäck flow between two (h, w) uint8 luma images: (h, w, 2) float32, dx and dy in pixels."""
    empty: Any = None
    return cv2.calcOpticalFlowFarneback(one, other, empty, 0.5, 3, 15, 3, 5, 1.2, 0)


@functools.cache
def _raft(weights: str | None) -> Any:
    """Load RAFT once per process: torchvision's weights from a file, or from the network if None."""
    import torch  # here: the default flow does without
    from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

    network = raft_large()
    if weights is None:
        state = Raft_Large_Weights.C_T_SKHT_V2.get_state_dict(progress=True, check_hash=True)
    elif not Path(weights).is_file():
        raise UserError(
            f"{weights}: no such file; curation.motion.raft_weights names torchvision's raft_large weights "
            "(download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth)"
        )
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    network.load_state_dict(state)
    return network.eval().to(pick_device())


def raft(one: np.ndarray, other: np.ndarray, weights: str | None) -> np.ndarray:
    """Compute RAFT flow between two (H, W, 3) uint8 RGB images: (H, W, 2) float32, dx and dy in pixels.

    The network takes sides that are multiples of 8: 800 × 450 is padded to 456 rows and the flow cropped back.
    Raises MemoryError, and UserError for missing weights.
    """
    import torch

    network = _raft(weights)
    device = next(network.parameters()).device
    height, width = one.shape[:2]
    padding = (0, -width % RAFT_MULTIPLE, 0, -height % RAFT_MULTIPLE)
    pair = torch.from_numpy(np.stack([one, other])).permute(0, 3, 1, 2).to(device, torch.float32) / 127.5 - 1
    padded = torch.nn.functional.pad(pair, padding, mode="replicate")
    with memory_errors(), torch.inference_mode():
        flow = network(padded[:1], padded[1:])[-1][0]
    return flow[:, :height, :width].permute(1, 2, 0).cpu().numpy()


def flow_function(config: MotionConfig) -> tuple[Flow, bool, Callable[[int, int], tuple[int, int]]]:
    """Return the configured flow, whether it takes RGB (else luma), and its image size for a display size.

    Sizes are (width, height).
    """
    if config.algorithm == "raft":

        def size(width: int, height: int) -> tuple[int, int]:
            return RAFT_SIZE if width >= height else (RAFT_SIZE[1], RAFT_SIZE[0])

        return functools.partial(raft, weights=config.raft_weights), True, size
    return farneback, False, functools.partial(grid_size, short_side=config.short_side)
