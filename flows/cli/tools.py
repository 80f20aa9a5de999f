"""The commands that work on folders directly: curate, browse, refilter, compare, fetch, convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from flows.cli.options import PortOption, PresetOption, console
from svd.core.errors import UserError

tools_app = typer.Typer()
out = Console(soft_wrap=True)

CatalogueArgument = Annotated[Path, typer.Argument(help="Output of the stage curation, e.g. outputs/tiny/curation.")]


@tools_app.command("curate")
def curate_videos(
    sources: Annotated[
        list[str],
        typer.Argument(help="Videos: folders, globs, s3:// prefixes, http(s) addresses, lists, WebDataset tars."),
    ],
    name: Annotated[str, typer.Option(help="Results go to outputs/NAME.")] = "mine",
    preset: PresetOption = "tiny",
    dry_run: Annotated[bool, typer.Option(help="Only say how much there is and what it will cost.")] = False,
) -> None:
    """Cut, clip, caption, score and filter your own videos: catalogue, shards and report in outputs/NAME/curation."""
    from flows.places import Place
    from flows.running.runner import run_preset_stage
    from svd.config.load import load_preset
    from svd.curation.dry_run import plan_curation
    from svd.sources.listing import list_sources

    chosen = load_preset(preset, {"name": name, "sources.paths": sources, "sources.synthetic": None})
    if dry_run:
        found = list_sources(sources)
        if not found:
            raise UserError(f"{', '.join(sources)}: no videos there")
        workers = chosen.compute.curation.workers
        planned = plan_curation(found, chosen.curation, chosen.sources.sources_per_shard, chosen.encoders, workers)
        print("\n".join(planned.lines()))
        return
    run_preset_stage("sources", chosen)
    run_preset_stage("encoders", chosen)
    report = run_preset_stage("curation", chosen)
    output = Place(name, "curation").output
    out.print(f"{report.summary}\nreport: {output}/report.html")
    _print_note(output)


@tools_app.command("browse")
def browse_catalogue(
    catalogue: CatalogueArgument,
    preset: Annotated[
        str | None, typer.Option("--preset", "-p", help="Preset that the page may save thresholds to.")
    ] = None,
    port: PortOption = 8124,
) -> None:
    """Open a page on a catalogue: players, sorting by any score, thresholds to drag with what they keep and drop."""
    import uvicorn

    from flows.stack.processes import check_port
    from svd.catalogue.browser.app import create_app
    from svd.config.load import preset_path

    app = create_app(catalogue, preset_path(preset) if preset else None)
    check_port(port, "the page", "--port")
    out.print(f"http://127.0.0.1:{port}   (Ctrl+C ends it)")
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


@tools_app.command("refilter")
def refilter_catalogue(catalogue: CatalogueArgument, preset: PresetOption = "tiny") -> None:
    """Judge a catalogue again with the preset's filters and renew its subsets; touches no video."""
    from svd.catalogue.refilter import renew_verdicts
    from svd.config.load import load_preset

    chosen = load_preset(preset).curation
    for axis, threshold in renew_verdicts(catalogue, chosen.filters, chosen.subsets).items():
        out.print(f"{axis}: {threshold:.6g}")
    _print_note(catalogue)


def _print_note(catalogue: Path) -> None:
    """Print what a reader of these verdicts must know of their thresholds."""
    from svd.catalogue.threshold_changes import few_clips_note

    if note := few_clips_note(json.loads((catalogue / "funnel.json").read_text())):
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)


@tools_app.command("compare")
def compare_catalogues(
    catalogues: Annotated[list[Path], typer.Argument(help="Two or more outputs of the stage curation.")],
    to: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("comparison.html"),
) -> None:
    """Put the statistics of several catalogues side by side, with the paper's table."""
    from svd.catalogue.report import write_report

    out.print(write_report(catalogues, to, [folder.parent.name for folder in catalogues]))


@tools_app.command("fetch")
def fetch_weights(
    repository: Annotated[str, typer.Argument(help="Hub id, e.g. stabilityai/stable-video-diffusion-img2vid.")],
    target: Annotated[Path, typer.Argument(help="Folder for the files.")],
    file: Annotated[list[str] | None, typer.Option(help="Only this file; may be given several times.")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Only files that fit a pattern, e.g. 'unet/*' or '*.fp16.safetensors'; may be repeated."),
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    sha256: Annotated[list[str] | None, typer.Option(help="FILE=HASH that a file must have.")] = None,
    token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="For gated repositories.")] = None,
) -> None:
    """Download released weights from the hub: all safetensors, JSON and text files, or those that you name.

    Broken downloads are resumed, hashes checked, pickles refused. All files are of one commit; fetched.json names it.
    """
    from svd.model.formats.hub import fetch_repository

    hashes = dict(pair.split("=", 1) for pair in sha256 or [] if "=" in pair)
    if len(hashes) != len(sha256 or []):
        raise UserError("--sha256 takes FILE=HASH, for example svd.safetensors=3b0c…")
    paths = fetch_repository(
        repository, target, filenames=file, include=include, revision=revision, token=token, sha256=hashes
    )
    for path in paths:
        out.print(path)


@tools_app.command("convert")
def convert_checkpoint(
    source: Annotated[Path, typer.Argument(help="A single .safetensors file, or a folder in diffusers' layout.")],
    target: Annotated[Path, typer.Argument(help="What to write; must not exist.")],
    to: Annotated[Literal["sgm", "diffusers"], typer.Option(help="Layout of the target.")] = "diffusers",
    half: Annotated[bool, typer.Option(help="Write float16.")] = False,
    sha256: Annotated[str | None, typer.Option(help="Hash that a single file must have.")] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Length the U-Net was trained at, if the source doesn't say; xt files: 25."),
    ] = None,
) -> None:
    """Convert checkpoints between the released single files and diffusers' folders, without a second copy in memory."""
    import torch

    from svd.model.formats.convert import convert_model

    done = convert_model(source, target, to, dtype=torch.float16 if half else None, sha256=sha256, frames=frames)
    out.print(f"{done.target}: {done.tensors} tensors")
    if done.missing:
        out.print(f"not in the source: {', '.join(done.missing)}")
