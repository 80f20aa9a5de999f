"""`svd track`: what waits for MLflow."""

from __future__ import annotations

import typer

from flows.cli.options import console

track_app = typer.Typer()


@track_app.command("flush")
def flush_journals() -> None:
    """Send what earlier runs could not deliver to MLflow."""
    from flows.tracking.runs import send_pending

    done, waiting = send_pending()
    console.print(f"{done} delivered, {waiting} still waiting")
    raise typer.Exit(1 if waiting else 0)
