"""`svd platform`: the files that are made from the table of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import console
from flows.rendering.files import stale_files, write_files
from svd.core.errors import UserError

platform_app = typer.Typer()


@platform_app.command("render")
def render_files(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail when a file is out of date.")] = False,
) -> None:
    """Write dvc.yaml, branches/dvc.yaml and prefect.yaml from the table of stages (flows/stages.py)."""
    if check:
        if stale := stale_files(Path()):
            names = ", ".join(str(path) for path in stale)
            raise UserError(f"{names}: not what flows/stages.py makes; run `svd platform render`")
        return
    written = write_files(Path())
    console.print(f"written: {', '.join(str(path) for path in written)}" if written else "nothing changed")
