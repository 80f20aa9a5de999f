"""The subcommands that work on folders directly: curate, browse, refilter, compare, fetch, convert, export, vote."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from flows.stack.processes import check_port
from svd.config.load import load_preset, preset_path
from svd.core.errors import UserError

if TYPE_CHECKING:
    from evaluation.preference.clips import Source

tools_app = typer.Typer()
vote_app = typer.Typer(
    help="Human preference: make a study, serve the page, compute the ratings.", no_args_is_help=True
)
tools_app.add_typer(vote_app, name="vote")
out = Console(soft_wrap=True)

PresetOption = Annotated[str, typer.Option("--preset", "-p", help="Name of a preset in presets/, or a YAML file.")]
CatalogueArgument = Annotated[Path, typer.Argument(help="Output of the stage curation, e.g. outputs/tiny/curation.")]
PortOption = Annotated[int, typer.Option(min=1, max=65535, help="Port of the page, on this machine only.")]
DatabaseOption = Annotated[str | None, typer.Option(help="Database URL (Postgres); default: SQLite in the folder.")]


@tools_app.command()
def curate(
    sources: Annotated[
        list[str],
        typer.Argument(help="Videos: folders, globs, s3:// prefixes, http(s) addresses, lists, WebDataset tars."),
    ],
    name: Annotated[str, typer.Option(help="Results go to outputs/NAME.")] = "mine",
    preset: PresetOption = "tiny",
    dry_run: Annotated[bool, typer.Option(help="Only say how much there is and what it will cost.")] = False,
) -> None:
    """Cut, clip, caption, score and filter your own videos: catalogue, shards and report in outputs/NAME/curation."""
    from flows.runner import run_preset_stage
    from svd.curation.dry_run import plan
    from svd.sources.listing import list_sources

    chosen = load_preset(preset, {"name": name, "sources.paths": sources, "sources.synthetic": None})
    if dry_run:
        found = list_sources(sources)
        if not found:
            raise UserError(f"{', '.join(sources)}: no videos there")
        print("\n".join(plan(found, chosen.curation, chosen.sources.sources_per_shard, chosen.encoders).lines()))
        return
    run_preset_stage("sources", chosen)
    run_preset_stage("encoders", chosen)
    report = run_preset_stage("curation", chosen)
    out.print(f"{report.summary}\nreport: outputs/{name}/curation/report.html")


@tools_app.command()
def browse(
    catalogue: CatalogueArgument,
    preset: Annotated[
        str | None, typer.Option("--preset", "-p", help="Preset that the page may save thresholds to.")
    ] = None,
    port: PortOption = 8124,
) -> None:
    """Open a page on a catalogue: players, sorting by any score, thresholds to drag with what they keep and drop."""
    import uvicorn

    from svd.catalogue.browser.app import create_app

    app = create_app(catalogue, preset_path(preset) if preset else None)
    check_port(port, "the page", "--port")
    out.print(f"http://127.0.0.1:{port}   (Ctrl+C ends it)")
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


@tools_app.command()
def refilter(catalogue: CatalogueArgument, preset: PresetOption = "tiny") -> None:
    """Judge a catalogue again with the preset's filters and renew its subsets; touches no video."""
    from svd.catalogue.refilter import refilter as judge

    chosen = load_preset(preset).curation
    for axis, threshold in judge(catalogue, chosen.filters, chosen.subsets).items():
        out.print(f"{axis}: {threshold:.6g}")


@tools_app.command()
def compare(
    catalogues: Annotated[list[Path], typer.Argument(help="Two or more outputs of the stage curation.")],
    to: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("comparison.html"),
) -> None:
    """Put the statistics of several catalogues side by side, with the paper's table."""
    from svd.catalogue.report import write_report

    out.print(write_report(catalogues, to, [folder.parent.name for folder in catalogues]))


@tools_app.command()
def fetch(
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
    from svd.model.formats.hub import fetch_repository as download

    hashes = dict(pair.split("=", 1) for pair in sha256 or [] if "=" in pair)
    if len(hashes) != len(sha256 or []):
        raise UserError("--sha256 takes FILE=HASH, for example svd.safetensors=3b0c…")
    paths = download(repository, target, filenames=file, include=include, revision=revision, token=token, sha256=hashes)
    for path in paths:
        out.print(path)


@tools_app.command()
def convert(
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

    from svd.model.formats.convert import convert_model as write

    done = write(source, target, to, dtype=torch.float16 if half else None, sha256=sha256, frames=frames)
    out.print(f"{done.target}: {done.tensors} tensors")
    if done.missing:
        out.print(f"not in the source: {', '.join(done.missing)}")


@tools_app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Output of a training stage, e.g. outputs/tiny/image-to-video.")],
    target: Annotated[Path, typer.Argument(help="Folder (diffusers) or .safetensors file (sgm); must not exist.")],
    to: Annotated[Literal["sgm", "diffusers"], typer.Option(help="Layout of the target.")] = "diffusers",
    preset: PresetOption = "tiny",
) -> None:
    """Put a trained model, its autoencoder and its image encoder into one folder or file that others can load."""
    from svd.model.formats.export import export_model as write

    out.print(write(model, target, to, load_preset(preset).encoders))


class Axis(StrEnum):
    """What raters are asked about (E.1)."""

    quality = "quality"
    prompt = "prompt"


@vote_app.command("create")
def vote_create(
    folder: Annotated[Path, typer.Argument(help="Folder of the study.")],
    models: Annotated[
        list[str], typer.Argument(help="NAME=FOLDER of clips; files of the same name answer the same prompt.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="Texts: JSON {name: text}, or CSV with the columns name and prompt.")
    ] = None,
    axis: Annotated[
        list[Axis] | None,
        typer.Option(help="What to ask; may be given twice. Default: both with --prompts, else quality alone."),
    ] = None,
    watermark: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TOP,LEFT,BOTTOM,RIGHT in fractions: black in all models' clips (E.3: Pika's corner)."),
    ] = None,
    votes: Annotated[int, typer.Option(min=1, help="Votes a pair, prompt and question (E.1: 3).")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of order and sides.")] = 0,
    database: DatabaseOption = None,
) -> None:
    """Make a study: all pairs of models on all prompts, sides and order shuffled, attention checks mixed in (E.1).

    Clips are brought to one length and size first (E.3). Without texts there is nothing to follow, so raters are asked
    for visual quality alone, as in the paper's image-to-video study; `--axis prompt` shows file names as texts.
    """
    from evaluation.preference.study import create_study, read_prompts

    chosen = axis or ([Axis.quality, Axis.prompt] if prompts else [Axis.quality])
    axes = [one.value for one in dict.fromkeys(chosen)]
    texts = read_prompts(prompts) if prompts else None
    study = create_study(
        folder, _sources(models, watermark or []), texts, axes=axes, votes=votes, seed=seed, database=database
    )
    asked = f"{len(study.models)} models, {len(study.prompts)} prompts, asked for {' and '.join(study.axes)}"
    out.print(f"{asked}; serve it with: svd vote serve {folder}")


def _sources(models: list[str], watermarks: list[str]) -> list[Source]:
    """Models with their folders and watermarks. Raises UserError for what isn't written as it should be."""
    from evaluation.preference.clips import Box, Source

    folders = dict(model.split("=", 1) for model in models if "=" in model)
    if len(folders) != len(models) or not all(folders.values()):
        raise UserError(
            "name each model once, as NAME=FOLDER, for example ours=outputs/tiny/high-quality-finetuning/samples"
        )
    boxes: dict[str, list[Box]] = {name: [] for name in folders}
    for text in watermarks:
        name, _, numbers = text.partition("=")
        try:
            boxes[name].append(Box(*(float(number) for number in numbers.split(","))))
        except (KeyError, ValueError, TypeError):
            raise UserError(
                f"--watermark {text}: expected NAME=TOP,LEFT,BOTTOM,RIGHT with one of {', '.join(folders)}, "
                f"for example {next(iter(folders))}=0.9,0.8,1,1"
            ) from None
    return [Source(name, Path(path), tuple(boxes[name])) for name, path in folders.items()]


@vote_app.command("serve")
def vote_serve(
    folder: Annotated[Path, typer.Argument(help="Folder of the study.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: the whole network may vote.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the page.")] = 8123,
    database: DatabaseOption = None,
) -> None:
    """Serve the voting page."""
    from evaluation.preference.app import serve
    from evaluation.preference.study import load_study

    load_study(folder)
    check_port(port, "the page", "--port")
    out.print(f"http://{host}:{port}   (Ctrl+C ends it)")
    serve(folder, host, port, database)


@vote_app.command("results")
def vote_results(
    folder: Annotated[Path, typer.Argument(help="Folder of the study.")], database: DatabaseOption = None
) -> None:
    """Compute the paper's Elo and Bradley-Terry ratings with intervals; writes ratings.json, .csv and .png there."""
    from evaluation.preference.study import export

    out.print_json(data=export(folder, database))
