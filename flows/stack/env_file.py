"""`.env`: addresses and credentials of the local stack, as `svd stack up` writes them."""

from __future__ import annotations

import os
from pathlib import Path

ENV_FILE = Path(".env")


def read_env(path: Path = ENV_FILE) -> dict[str, str]:
    """Return the variables of a `.env` file; none when there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def load_env() -> None:
    """Take over `.env` where the environment says nothing else."""
    for name, value in read_env().items():
        os.environ.setdefault(name, value)
