"""The `svd` command. Every subcommand is a thin wrapper around a function of the library.

What takes long to import (torch, MLflow, DVC, Prefect) is imported inside the commands that use it, and a group of
commands when one of them is asked for: `svd --help` and the completion of the shell import none of it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.cli.lazy import lazy_group
from flows.cli.options import PresetOption, StoreOption, console
from flows.cli.tools import tools_app
from flows.stack.env_file import load_env
from svd.core.disk import full_disk_in_one_line
from svd.core.errors import UserError
from svd.training.planning.gpus import GPUS, UTILISATION, choose_gpu

app = typer.Typer(
    help="Stable Video Diffusion, reproduced: curation, training, generation and evaluation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
INTERRUPTED = 130
GROUPS = {
    "config": ("flows.cli.config:config_app", "Show and check presets."),
    "track": ("flows.cli.track:track_app", "What waits for MLflow."),
    "stack": ("flows.cli.stack:stack_app", "The local stack: Prefect, workers, MLflow, S3."),
    "platform": (
        "flows.cli.platform:platform_app",
        "Set up and check a Prefect server; files made from the table of stages.",
    ),
    "generate": ("flows.cli.generate:generate_app", "Generate clips with trained or released models."),
    "evaluate": (
        "flows.cli.evaluate:evaluate_app",
        "Score folders of clips, compare evaluations, list the protocols. (A model: svd stage ucf101-evaluation.)",
    ),
    "export": ("flows.cli.export:export_app", "Export a trained model or a curated data set, as others read them."),
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
    profile: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Trace N steps of each phase of a training, to .local/profiles/PRESET/STAGE."
        ),
    ] = None,
) -> None:
    """Run one stage on this machine; inputs and result lie in outputs/PRESET. A run that was killed continues."""
    from flows.stages import find_stage, require_training
    from svd.config.load import load_preset

    find_stage(name)
    if profile:
        require_training(name)
    chosen = load_preset(preset)  # both report a mistake before the rest is imported, which takes long
    from flows.running.runner import run_preset_stage

    console.print(run_preset_stage(name, chosen, store_option=store, profile=profile or 0).summary)


@app.command()
def plan(
    names: Annotated[list[str] | None, typer.Argument(metavar="[STAGE]...", help="Trainings (default: all).")] = None,
    preset: PresetOption = "tiny",
    gpu: Annotated[str, typer.Option(help=f"{', '.join(GPUS)}; of the last one memory alone.")] = "a100-80",
    memory: Annotated[float | None, typer.Option(min=0, metavar="GIB", help="Another memory than that GPU's.")] = None,
    peak: Annotated[float | None, typer.Option(min=0.001, metavar="TFLOPS", help="Another peak than its.")] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the peak that is reached; the default was, on one H200.")
    ] = UTILISATION,
    price: Annotated[float | None, typer.Option(min=0, help="Of a GPU's hour (default: compute.prices).")] = None,
    devices: Annotated[int, typer.Option(min=1, help="GPUs a node where the preset says `auto`.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, operations, hours.")] = False,
) -> None:
    """Say what trainings need before they run: parameters, memory, operations, samples, GPU hours, cost.

    Exits with 1 when one doesn't fit into the GPU, or can't share its batch among its devices.
    """
    from flows.stages import find_stage
    from svd.config.load import load_preset

    for name in names or []:
        find_stage(name)
    chosen = load_preset(preset)
    device = choose_gpu(gpu, memory, peak)
    from flows.cli.plan import print_plan
    from svd.training.planning.plan import Assumptions

    print_plan(chosen, names or [], Assumptions(device, utilisation, devices), price, as_json)


@app.command(hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context, plan: Annotated[bool, typer.Option("--plan", help="The same as `svd plan`.")] = False
) -> None:
    """Say where trainings are started, or with --plan what they need."""
    if not plan:
        raise UserError("a training is a stage: `svd stage image-to-video`; what it needs says `svd plan`")
    app(["plan", *context.args])


@app.command()
def inventory(preset: PresetOption = "tiny") -> None:
    """List the files outside the project that a preset names, and the code of the stages, so that DVC sees changes."""
    from flows.recording.inventory import take
    from svd.config.load import load_preset

    found = take(load_preset(preset))
    count = len({str(row[0]) for lists in found.values() for listing in lists.values() for row in listing})
    console.print(f"{count} files outside the project")


@app.command()
def stages(
    reaching: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only the stages that run again when the code in this file changes."),
    ] = None,
) -> None:
    """List the stages, what each reads, and the work pool it runs in."""
    from flows.stages import STAGES

    rows = [*STAGES.values()]
    if reaching:
        from flows.recording.code import stages_reaching

        rows = stages_reaching(reaching)
    table = Table("stage", "reads", "pool", "in full-pipeline", "what it does")
    for item in rows:
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
    from svd.core.addresses import public_address

    result = full_pipeline(preset=preset, force=force, store=store)
    out = Console(soft_wrap=True)
    out.print(f"\nreport: {result['report']}")
    out.print(f"MLflow: mlflow ui --backend-store-uri {public_address(tracking_uri())}   (or: make ui)")


@app.command()
def pull(
    stages: Annotated[list[str] | None, typer.Argument(help="Stages whose outputs to bring (default: all).")] = None,
    preset: PresetOption = "tiny",
    store: StoreOption = None,
) -> None:
    """Bring the newest outputs of stages from a store by their hashes, and what its dvc.lock says of them."""
    from flows.stages import STAGES, find_stage

    names = [find_stage(name).name for name in stages or STAGES]
    if not store:
        raise UserError("say where from: --store s3://bucket/prefix (or SVD_STORE)")
    from flows.recording import results_store
    from flows.recording.dvc import pull as pull_outputs
    from svd.config.load import load_preset

    name = load_preset(preset).name
    outputs = [output for stage in names if (output := results_store.stored_output(store, name, stage))]
    if not outputs:
        raise UserError(f"{store}: no output of these stages of preset '{name}' is stored there")
    for output in outputs:
        results_store.adopt_locks(store, name, output.name)
    brought = pull_outputs(outputs, store)
    console.print(f"{len(outputs)} outputs of '{name}' are here, {brought} of them brought now")


@app.command()
def report(preset: PresetOption = "tiny", store: StoreOption = None) -> None:
    """Print an address of a preset's report for the browser; one in S3 is signed and valid for a day."""
    from flows.places import Place
    from flows.recording.results_store import stored_file
    from svd.config.load import load_preset
    from svd.storage import join, link

    name, page = load_preset(preset).name, "report.html"
    try:
        where = stored_file(store, name, "report", page) if store else join(Place(name, "report").output, page)
        print(link(where, name=page))
    except FileNotFoundError as error:
        raise UserError(f"{error}; make it with `svd pipeline --preset {preset}`") from None


@app.command()
def lineage(
    model: Annotated[
        str | None,
        typer.Argument(help="MODEL@ALIAS or MODEL/VERSION as registered, an MLflow run id, or outputs/PRESET/STAGE."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="The other way, for a takedown: address of a source, a folder of them, or a source id."),
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Print all sources or clips, not the first 10.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all of them.")] = False,
    store: StoreOption = None,
) -> None:
    """Show what a model was made from, down to its sources, or with --source what a source went into."""
    if (model is None) == (source is None):
        raise UserError("give a model, for example svd-image-to-video@candidate, or --source ADDRESS")
    from flows.cli.lineage import print_origin, print_takedown

    shown = None if show_all else 10
    if model is not None:
        print_origin(model, shown, as_json, store)
    elif source is not None:
        print_takedown(source, shown, as_json, store)


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Do it. Without, only say what would be removed.")] = False,
    older_than: Annotated[
        float, typer.Option(min=0, metavar="DAYS", help="Leave everything that changed within this many days.")
    ] = 7,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Name everything that goes.")] = False,
    store: StoreOption = None,
) -> None:
    """Remove what nothing needs from DVC's cache, the store, work/, .cache/, outputs/ and MLflow's artifacts.

    What a lock file here, in git's branches and tags or in the store names stays, and all that registered models were
    made from.
    """
    from flows.cli.gc import collect_garbage

    collect_garbage(older_than, store, delete, verbose)


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
    """Run the command line: a user's mistake is one line on stderr and exit code 1, Ctrl-C one and 130."""
    load_env()
    try:
        with full_disk_in_one_line(Path()):
            app()
    except UserError as error:
        console.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            console.print("interrupted; the same command goes on where it was")
        raise
