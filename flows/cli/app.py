"""The `svd` command. Every subcommand is a thin wrapper around a function of the library.

What takes long to import (torch, MLflow, DVC, Prefect) is imported inside the commands that use it, and a group of
commands when one of them is asked for: `svd --help` and the completion of the shell import none of it.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.cli.lazy import lazy_group
from flows.cli.options import PresetOption, StoreOption, console
from flows.cli.tools import tools_app
from flows.stack.env_file import load_env
from svd.core.errors import UserError

app = typer.Typer(
    help="Stable Video Diffusion, reproduced: curation, training, generation and evaluation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
GROUPS = {
    "config": ("flows.cli.config:config_app", "Show and check presets."),
    "track": ("flows.cli.track:track_app", "What waits for MLflow."),
    "stack": ("flows.cli.stack:stack_app", "The local stack: Prefect, workers, MLflow, S3."),
    "platform": ("flows.cli.platform:platform_app", "Files that are made from the table of stages."),
    "generate": ("flows.cli.generate:generate_app", "Generate clips with trained or released models."),
    "evaluate": (
        "flows.cli.evaluate:evaluate_app",
        "Score folders of clips, compare evaluations, list the protocols. (A model: svd stage ucf101-evaluation.)",
    ),
    "vote": ("flows.cli.vote:vote_app", "Human preference: make a study, serve the page, compute the ratings."),
}
for _name, (_target, _help) in GROUPS.items():
    app.add_typer(lazy_group(_target, _help), name=_name)
app.add_typer(tools_app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"svd-platform {version('svd-platform')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that come before the name of a command."""


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="Stage to run, for example `curation`; `svd stages` lists them.")],
    preset: PresetOption = "tiny",
    store: StoreOption = None,
) -> None:
    """Run one stage on this machine; inputs and result lie in outputs/PRESET. A run that was killed continues."""
    from flows.stages import find_stage

    find_stage(name)  # a mistake is reported before the rest is imported
    from flows.running.runner import run_stage

    console.print(run_stage(name, preset, store_option=store).summary)


@app.command()
def inventory(preset: PresetOption = "tiny") -> None:
    """List the files outside the project that a preset names, and the code of the stages, so that DVC sees changes."""
    from flows.recording.inventory import take
    from svd.config.load import load_preset

    found = take(load_preset(preset))
    count = len({str(row[0]) for lists in found.values() for listing in lists.values() for row in listing})
    console.print(f"{count} files outside the project")


@app.command()
def stages() -> None:
    """List the stages, what each reads, and the work pool it runs in."""
    from flows.stages import STAGES

    table = Table("stage", "reads", "pool", "in full-pipeline", "what it does")
    for item in STAGES.values():
        table.add_row(
            item.name, ", ".join(item.inputs), item.pool, "" if item.branch else "yes", item.description.rstrip(".")
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@app.command()
def pipeline(
    preset: Annotated[str | None, typer.Option("--preset", "-p", help="Default: the one in params.yaml.")] = None,
    force: Annotated[bool, typer.Option(help="Run unchanged stages as well.")] = False,
    store: StoreOption = None,
) -> None:
    """Run all stages that changed as the Prefect flow `full-pipeline` in this process."""
    from flows.project import pipeline_preset

    pipeline_preset(preset)  # a mistake is reported before Prefect starts
    from flows.recording.dvc import open_repo

    open_repo().close()
    from flows.prefect_flows.full_pipeline import full_pipeline
    from flows.tracking.runs import tracking_uri

    result = full_pipeline(preset=preset, force=force, store=store)
    out = Console(soft_wrap=True)
    out.print(f"\nreport: {result['report']}")
    out.print(f"MLflow: mlflow ui --backend-store-uri {tracking_uri()}   (or: make ui)")


@app.command()
def report(preset: PresetOption = "tiny", store: StoreOption = None) -> None:
    """Print an address of a preset's report for the browser; one in S3 is signed and valid for a day."""
    from flows.places import Place
    from svd.config.load import load_preset
    from svd.storage import join, link

    place = Place(load_preset(preset).name, "report")
    folder = place.uri(store) if store else place.output
    try:
        print(link(join(folder, "report.html")))
    except FileNotFoundError as error:
        raise UserError(f"{error}; make it with `svd pipeline --preset {preset}`") from None


@app.command()
def doctor(preset: PresetOption = "tiny") -> None:
    """Check this machine and say for each failure what to do. Exits with 1 when something needed is missing."""
    from flows.cli.doctor import run_checks
    from svd.config.load import load_preset

    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fail": "[red]fail[/]"}
    table = Table("")
    for title in ("check", "found", "what to do"):
        table.add_column(title, overflow="fold")  # names of files and options are never cut
    failed = False
    for finding in run_checks(load_preset(preset)):
        failed |= finding.state == "fail"
        table.add_row(marks[finding.state], finding.name, finding.found, finding.advice)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    raise typer.Exit(1 if failed else 0)


def run_command_line() -> None:
    """Run the command line: a user's mistake is one line on stderr and exit code 1."""
    load_env()
    try:
        app()
    except UserError as error:
        console.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
