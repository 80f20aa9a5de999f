"""Continuing a sharded training without shards, so that `compute.*.strategy` may change while a training is under way.

FSDP2 itself reads whole checkpoints and those of another number of ranks; the other strategies read whole ones alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from svd.core.files import exclusive, replace_file
from svd.training.checkpoint_files import METADATA, Damaged, require_whole


def readable_checkpoint(path: Path | None, strategy: str) -> Path | None:
    """Return a checkpoint that `strategy` can read: `path` itself, or the shards in it as one file beside it.

    Ranks on a shared file system may call it at once: one of them merges, the others wait.
    """
    if path is None or path.is_file() or strategy == "fsdp2":
        return path
    whole = path.with_name(f"{path.name}.whole")
    with exclusive(path.with_name(f".{path.name}.lock")):
        if not _is_whole(whole):
            partial = path.with_name(f"{path.name}.part")
            torch.save(_merged(path, partial), partial)
            replace_file(partial, whole)
    return whole


def _is_whole(checkpoint: Path) -> bool:
    try:
        require_whole(checkpoint)
    except Damaged:
        return False
    return True


def _merged(path: Path, scratch: Path) -> dict[str, Any]:
    """Return the content of a sharded checkpoint in the form of a whole one; `scratch` is overwritten."""
    dcp_to_torch_save(path, scratch)
    merged: dict[str, Any] = torch.load(scratch, weights_only=True)
    merged |= torch.load(path / METADATA, weights_only=True)
    states = [merged.pop(name) for name in sorted(merged) if name.startswith("optimizer_")]
    merged["optimizer_states"] = [_numbered(state) for state in states]
    return merged


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """Key an optimiser's state by the numbers of the parameters, as torch's optimisers do, instead of their names."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {numbers[name]: values for name, values in state["state"].items()}, "param_groups": groups}
