"""Settings that users make with variables of the environment."""

from __future__ import annotations

import os
from pathlib import Path

from svd.core.errors import UserError


def seconds_from(variable: str, default: float) -> float:
    """Return the seconds that a variable sets; raises UserError unless they are a number above 0."""
    text = os.environ.get(variable) or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{variable} is '{text}'; give seconds, for example {default:g}")
    return seconds


def cache_folder() -> Path:
    """Return where this machine keeps what can be fetched or made again: `$SVD_CACHE`, by default `~/.cache/svd`."""
    return Path(os.environ.get("SVD_CACHE") or "~/.cache/svd").expanduser()
