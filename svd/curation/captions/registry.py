"""Captioners by name: a captioner is the module of its name, imported only when a preset uses it."""

from __future__ import annotations

from importlib import import_module
from typing import get_args

from svd.config import CaptionerName, CaptionsConfig
from svd.curation.captions.base import MOTION, SIDECAR, Captioner

WITHOUT_NETWORK = (SIDECAR, MOTION)
NETWORK_CAPTIONERS: tuple[str, ...] = tuple(name for name in get_args(CaptionerName) if name not in WITHOUT_NETWORK)


def make_captioners(config: CaptionsConfig, device: str) -> list[Captioner]:
    """Load the configured captioners that need a network.

    They run in the order of `CaptionerName`, so a captioner that reads others' captions (the LLM) stands after them.
    Raises UserError that names a missing option or weights that can't be loaded.
    """
    return [_make(name, config, device) for name in NETWORK_CAPTIONERS if name in config.captioners]


def _make(name: str, config: CaptionsConfig, device: str) -> Captioner:
    """Call `make_<name>` of the module `<name>`."""
    module = import_module(f"svd.curation.captions.{name}")
    captioner: Captioner = getattr(module, f"make_{name}")(config, device)
    return captioner
