"""The `svd` command. Every subcommand is a thin wrapper around a function of the library."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

from flows.cli.evaluate import evaluate_app
from flows.cli.generate import generate_app
from flows.cli.tools import tools_app
from flows.stack.stack import load_env
from svd.config.load import load_preset
from svd.core.errors import UserError

app = typer.Typer(
    help="Stable Video Diffusion, reproduced: curation, training, generation and evaluation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
config_app = typer.Typer(help="Show and check presets.", no_args_is_help=True)
track_app = typer.Typer(help="What waits for MLflow.", no_args_is_help=True)
stack_app = typer.Typer(help="The local stack: Prefect, workers, MLflow, S3.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(track_app, name="track")
app.add_typer(stack_app, name="stack")
app.add_typer(generate_app, name="generate")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(tools_app)
console = Console(stderr=True)

PresetOption = Annotated[str, typer.Option("--preset", "-p", help="Name of a preset in presets/, or a YAML file.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", envvar="SVD_STORE", help="s3://bucket/prefix to fetch inputs from and publish outputs to."),
]


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="Stage to run, for example `curation`; `svd stages` lists them.")],
    preset: PresetOption = "tiny",
    store: StoreOption = None,
) -> None:
    """Run one stage on this machine; inputs and result lie in outputs/PRESET. A run that was killed continues."""
    from flows.runner import run_stage

    console.print(run_stage(name, preset, store_option=store).summary)


@app.command()
def inventory(preset: PresetOption = "tiny") -> None:
    """List the files outside the project that a preset names, so that DVC and the flows see when they change."""
    from flows.recording.inventory import take

    found = take(load_preset(preset))
    count = len({str(row[0]) for lists in found.values() for listing in lists.values() for row in listing})
    console.print(f"{count} files outside the project")


@app.command()
def stages() -> None:
    """List the stages, what each reads, and the work pool it runs in."""
    from flows.stages import BRANCHES, STAGES

    table = Table("stage", "reads", "pool", "in full-pipeline")
    for item in STAGES.values():
        table.add_row(item.name, ", ".join(item.inputs), item.pool, "" if item.name in BRANCHES else "yes")
    Console().print(table)


@app.command()
def pipeline(
    preset: Annotated[str | None, typer.Option("--preset", "-p", help="Default: the one in params.yaml.")] = None,
    force: Annotated[bool, typer.Option(help="Run unchanged stages as well.")] = False,
    store: StoreOption = None,
) -> None:
    """Run all stages that changed as the Prefect flow `full-pipeline` in this process."""
    from flows.prefect_flows.full_pipeline import full_pipeline, select_preset
    from flows.recording.dvc import open_repo
    from flows.tracking.runs import tracking_uri

    select_preset(preset)  # a mistake is told before Prefect starts
    open_repo().close()
    result = full_pipeline(preset=preset, force=force, store=store)
    out = Console(soft_wrap=True)
    out.print(f"\nreport: {result['report']}")
    out.print(f"MLflow: mlflow ui --backend-store-uri {tracking_uri()}   (or: make ui)")


@app.command()
def report(preset: PresetOption = "tiny", store: StoreOption = None) -> None:
    """Print an address of a preset's report for the browser; one in S3 is signed and valid for a day."""
    from flows.runner import output_folder
    from svd.storage import join, link

    chosen = load_preset(preset)
    folder = join(store, chosen.name, "report") if store else output_folder(chosen, "report")
    try:
        print(link(join(folder, "report.html")))
    except FileNotFoundError as error:
        raise UserError(f"{error}; make it with `svd pipeline --preset {preset}`") from None


@config_app.command("show")
def config_show(preset: PresetOption = "tiny") -> None:
    """Print the resolved values of a preset, defaults included."""
    values = load_preset(preset).model_dump(mode="json")
    yaml.safe_dump(values, sys.stdout, sort_keys=False, allow_unicode=True)


@config_app.command("check")
def config_check(preset: PresetOption = "tiny") -> None:
    """Check a preset: unknown keys, wrong types and ranges are named with their path and the nearest valid name."""
    console.print(f"preset '{load_preset(preset).name}' is valid")


@app.command()
def doctor(preset: PresetOption = "tiny") -> None:
    """Check this machine and say for each failure what to do. Exits with 1 when something needed is missing."""
    from flows.cli.doctor import examine

    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fail": "[red]fail[/]"}
    table = Table("")
    for title in ("check", "found", "what to do"):
        table.add_column(title, overflow="fold")  # names of files and options are never cut
    failed = False
    for finding in examine(load_preset(preset)):
        failed |= finding.state == "fail"
        table.add_row(marks[finding.state], finding.name, finding.found, finding.advice)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    raise typer.Exit(1 if failed else 0)


@track_app.command("flush")
def track_flush() -> None:
    """Send what earlier runs could not deliver to MLflow."""
    from flows.tracking.runs import send_pending

    done, waiting = send_pending()
    console.print(f"{done} delivered, {waiting} still waiting")
    raise typer.Exit(1 if waiting else 0)


@stack_app.command("up")
def stack_up(
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
def stack_down() -> None:
    """Stop exactly what `svd stack up` started, and remove .env."""
    from flows.stack.stack import down

    stopped = down()
    console.print(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")


@stack_app.command("status")
def stack_status() -> None:
    """Show which processes of the stack run, and their addresses."""
    from flows.stack.stack import read_env, running

    processes, env = list(running()), read_env()
    table = Table("process", "pid", "port")
    for process in processes:
        table.add_row(process.name, str(process.pid), str(process.port or ""))
    Console().print(table if processes else "nothing is running")
    if processes and env:
        Console().print(_addresses(env))


def main() -> None:
    """Entry point of the `svd` command: a user's mistake is one line on stderr and exit code 1."""
    load_env()
    try:
        app()
    except UserError as error:
        console.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
