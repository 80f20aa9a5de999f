"""Seeds, metadata and files of the clips that `svd generate` makes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from flows.cli.generate_options import Networks, Results
from svd.config import EncodersConfig, Sampling
from svd.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from svd.generation.safety import SafetyFilter

Item = TypeVar("Item")
# Options that change a clip by rounding at most, and the first clip's `seed`: each file records its own.
UNRECORDED = frozenset({"device", "offload", "sequential", "compile", "out", "format", "count", "batch", "seed"})


def seeded(items: list[Item], results: Results) -> list[tuple[Item, int]]:
    """Repeat every item `count` times, with a seed each; raise UserError when clips would overwrite one file."""
    jobs = [item for item in items for _ in range(results.count)]
    check_single(results.out, len(jobs))
    return [(item, results.seed + number) for number, item in enumerate(jobs)]


def groups(items: list[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items in groups of `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def check_single(out: Path, clips: int) -> None:
    """Raise UserError, before any work, for an unknown format and for several clips in one file."""
    from svd.media.clips import check_format

    check_format(out)
    if out.suffix and clips > 1:
        raise UserError(f"--out {out}: a file holds one clip, not {clips}; give a folder")


def describe(task: str, networks: Networks, sampling: Sampling, results: Results, **values: object) -> dict[str, str]:
    """Return the metadata from which a clip can be made again: the final values, under the options' names.

    values: the command's own options. None isn't written; lists are written as JSON.
    """
    settings: dict[str, Any] = sampling.model_dump()
    for group in (networks, results):
        settings |= {k: v for k, v in dataclasses.asdict(group).items() if k not in UNRECORDED}
    if results.safety_heads is None:
        settings = {k: v for k, v in settings.items() if not k.startswith("safety_")}
    settings |= {**values, "task": task, "origin": _origin(networks.model)}
    return {
        key: json.dumps(value) if isinstance(value, list) else str(value)
        for key, value in settings.items()
        if value is not None
    }


def _origin(model: Path | None) -> str | None:
    """Return the hub's repository and commit that a model was fetched from; None for another one."""
    from svd.model.formats.hub import recorded

    if model is None:
        return None
    folder, name = (model.parent, model.name) if model.is_file() else (model, "unet/config.json")
    entry = recorded(folder).get(name)
    return f"{entry['repository']}@{entry['commit']}" if entry else None


class Writer:
    """Saves clips under readable names and prints the paths; filters and watermarks them first when asked to."""

    def __init__(self, results: Results, details: dict[str, str]) -> None:
        from svd.generation.safety import load_safety_filter

        self.results, self.details = results, details
        self.safety: SafetyFilter | None = None
        if results.safety_heads is not None:
            clip = EncodersConfig(model=results.safety_model, weights=results.safety_weights)
            self.safety = load_safety_filter(results.safety_heads, clip)

    def save(self, clip: Tensor, fps: float, name: str, seed: int, **details: str) -> None:
        """Write one clip (T, 3, H, W) in [0, 1]; `name` and `seed` make its file name in a folder."""
        from svd.media.clips import save_clip
        from svd.media.watermark import MESSAGE

        if self.safety is not None:
            clip, flagged = self.safety.apply(clip)
            if flagged:
                typer.echo(f"{name}: the safety filter blurred this clip", err=True)
        path = self._path(name, seed, len(clip))
        metadata = self.details | details | {"seed": str(seed)}
        save_clip(path, clip, fps, metadata, MESSAGE if self.results.watermark else None)
        typer.echo(str(path))

    def _path(self, name: str, seed: int, frames: int) -> Path:
        out, kind = self.results.out, self.results.format
        if out.suffix:
            return out
        slug = re.sub(r"\W+", "-", name).strip("-").lower()[:60] or "clip"
        stem = f"{slug}-{seed}"
        return out / stem if kind == "png" and frames > 1 else out / f"{stem}.{kind}"
