"""`svd stack`: start, stop and show the local stack."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.cli.options import console

stack_app = typer.Typer()


@stack_app.command("up")
def start_stack(
    prefect: Annotated[int, typer.Option(min=1, max=65535, help="Port of the Prefect server.")] = 4200,
    mlflow: Annotated[int, typer.Option(min=1, max=65535, help="Port of the MLflow server.")] = 5151,
    s3: Annotated[int, typer.Option(min=1, max=65535, help="Port of the S3 server.")] = 8333,
    master: Annotated[int, typer.Option(min=1, max=65535, help="Port of SeaweedFS's master.")] = 9333,
    volume: Annotated[int, typer.Option(min=1, max=65535, help="Port of SeaweedFS's volume server.")] = 9340,
    filer: Annotated[int, typer.Option(min=1, max=65535, help="Port of SeaweedFS's filer.")] = 9388,
    admin: Annotated[int, typer.Option(min=1, max=65535, help="Port of SeaweedFS's maintenance server.")] = 23646,
) -> None:
    """Start the servers and workers that don't run yet, deploy the flows, write .env. A taken port is named."""
    from flows.stack.stack import Ports, up

    Console().print(_addresses(up(Ports(prefect, mlflow, s3, master, volume, filer, admin))))
    console.print("run the pipeline with: prefect deployment run full-pipeline")


def _addresses(env: dict[str, str]) -> Table:
    table = Table("service", "address", show_header=False)
    table.add_row("Prefect", env["PREFECT_API_URL"].removesuffix("/api"))
    table.add_row("MLflow", env["MLFLOW_TRACKING_URI"])
    table.add_row("S3", env["AWS_ENDPOINT_URL"])
    return table


@stack_app.command("down")
def stop_stack() -> None:
    """Stop exactly what `svd stack up` started, and remove .env."""
    from flows.stack.stack import down

    stopped = down()
    console.print(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")


@stack_app.command("status")
def show_stack() -> None:
    """Show which processes of the stack run, and their addresses."""
    from flows.stack.env_file import read_env
    from flows.stack.stack import running

    processes, env = list(running()), read_env()
    table = Table("process", "pid", "port")
    for process in processes:
        table.add_row(process.name, str(process.pid), str(process.port or ""))
    Console().print(table if processes else "nothing is running")
    if processes and env:
        Console().print(_addresses(env))
