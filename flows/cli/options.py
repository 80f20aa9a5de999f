"""Options and the consoles that several commands share."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

PresetOption = Annotated[str, typer.Option("--preset", "-p", help="Name of a preset in presets/, or a YAML file.")]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="SVD_STORE",
        help="s3://bucket/prefix or a shared folder to pull inputs from and push outputs to.",
    ),
]
PortOption = Annotated[int, typer.Option(min=1, max=65535, help="Port of the page, on this machine only.")]
console = Console(stderr=True)


def table_console() -> Console:
    """Return a console for results. Piped output is for programs: no table is cut to a narrow screen."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
