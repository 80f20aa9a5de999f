"""`svd platform`: set up a Prefect server, check what its pools can do, write the files made from the stages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from flows.cli.options import console, table_console
from flows.project import current_preset
from flows.rendering.files import stale_files, write_files
from flows.stages import POOLS
from svd.core.errors import UserError

platform_app = typer.Typer()


@platform_app.command("render")
def render_files(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail when a file is out of date.")] = False,
) -> None:
    """Write dvc.yaml, branches/dvc.yaml and prefect.yaml from the table of stages (flows/stages.py)."""
    current_preset()  # refuses a folder that is no project before files appear in it
    if check:
        if stale := stale_files(Path()):
            names = ", ".join(str(path) for path in stale)
            raise UserError(f"{names}: not what flows/stages.py makes; run `svd platform render`")
        return
    written = write_files(Path())
    console.print(f"written: {', '.join(str(path) for path in written)}" if written else "nothing changed")


@platform_app.command("init")
def initialise(
    pools: Annotated[
        Literal["kubernetes", "process"], typer.Option(help="What runs the stages: pods, or processes of a worker.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pools that were edited, too.")] = False,
) -> None:
    """Set up the server at PREFECT_API_URL: pools, queue, automations, block of results, bucket, all deployments.

    May be repeated at any time. A pool that somebody edited in Prefect is kept as it is.
    """
    import subprocess

    from flows.stack.server_setup import set_up_server

    for name in set_up_server(pools, overwrite):
        console.print(f"pool '{name}' was edited in Prefect and is kept; --overwrite replaces it")
    deployed = subprocess.run(["prefect", "--no-prompt", "deploy", "--all"], check=False, env=os.environ)
    if deployed.returncode:
        raise UserError("`prefect deploy --all` failed; its message stands above")


@platform_app.command("check")
def check_platform(
    pool: Annotated[list[str] | None, typer.Option(help="Pool to check; may be repeated (default: all).")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="How long a pool may take.")] = 10,
) -> None:
    """Run a probe in each pool: does it start, reach the store and MLflow, publish; says why a pod doesn't start."""
    if not os.environ.get("PREFECT_API_URL"):
        raise UserError("set PREFECT_API_URL first: the server whose pools are to be checked")
    from flows.checking.pools import check_pools

    def say(name: str, state: str) -> None:
        console.print(f"{name}: {state}", markup=False)

    checks = check_pools(pool or list(POOLS), 60 * minutes, say)
    table = Table("pool", "probe", "", "seen")
    for check in checks:
        for finding in check.findings:
            table.add_row(check.pool, finding.probe, "passed" if finding.passed else "FAILED", finding.seen)
    table_console().print(table)
    if failed := [check.pool for check in checks if not check.passed]:
        raise UserError(f"not ready: {', '.join(failed)}")
