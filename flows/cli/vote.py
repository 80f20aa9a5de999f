"""`svd vote`: make a study of human preference, serve its page, compute the ratings (E.1)."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import table_console
from flows.stack.processes import check_port
from svd.core.errors import UserError

if TYPE_CHECKING:
    from evaluation.preference.clips import ModelClips

vote_app = typer.Typer()
out = table_console()

DatabaseOption = Annotated[str | None, typer.Option(help="Database URL (Postgres); default: SQLite in the folder.")]


class Criterion(StrEnum):
    """A question to raters (E.1)."""

    quality = "quality"
    prompt = "prompt"


@vote_app.command("create")
def create_vote(
    folder: Annotated[Path, typer.Argument(help="Folder of the study.")],
    models: Annotated[
        list[str], typer.Argument(help="NAME=FOLDER of clips; files of the same name answer the same prompt.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="Texts: JSON {name: text}, or CSV with the columns name and prompt.")
    ] = None,
    axis: Annotated[
        list[Criterion] | None,
        typer.Option(help="What to ask; may be given twice. Default: both with --prompts, else quality alone."),
    ] = None,
    watermark: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TOP,LEFT,BOTTOM,RIGHT in fractions: black in all models' clips (E.3: Pika's corner)."),
    ] = None,
    votes: Annotated[int, typer.Option(min=1, help="Votes per pair, prompt and question (E.1: 3).")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of order and sides.")] = 0,
    database: DatabaseOption = None,
) -> None:
    """Make a study: all pairs of models on all prompts, sides and order shuffled, attention checks mixed in (E.1).

    Clips are brought to one length and size first (E.3). Without texts there is nothing to follow, so raters are asked
    for visual quality alone, as in the paper's image-to-video study; `--axis prompt` shows file names as texts.
    """
    from evaluation.preference.study import create_study, read_named_prompts

    chosen = axis or ([Criterion.quality, Criterion.prompt] if prompts else [Criterion.quality])
    axes = [one.value for one in dict.fromkeys(chosen)]
    texts = read_named_prompts(prompts) if prompts else None
    study = create_study(
        folder, _sources(models, watermark or []), texts, axes=axes, votes=votes, seed=seed, database=database
    )
    asked = f"{len(study.models)} models, {len(study.prompts)} prompts, asked for {' and '.join(study.axes)}"
    out.print(f"{asked}; serve it with: svd vote serve {folder}")


def _sources(models: list[str], watermarks: list[str]) -> list[ModelClips]:
    """Return the models with their folders and watermarks; raises UserError for what isn't in the expected form."""
    from evaluation.preference.clips import Box, ModelClips

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
    return [ModelClips(name, Path(path), tuple(boxes[name])) for name, path in folders.items()]


@vote_app.command("serve")
def serve_vote(
    folder: Annotated[Path, typer.Argument(help="Folder of the study.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: the whole network may vote.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the page.")] = 8123,
    database: DatabaseOption = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Name by which raters reach the page, if not this machine's; repeat for more."),
    ] = None,
) -> None:
    """Serve the voting page."""
    from evaluation.preference.app import serve
    from evaluation.preference.study import load_study

    load_study(folder)
    check_port(port, "the page", "--port")
    out.print(f"http://{host}:{port}   (Ctrl+C ends it)")
    serve(folder, host, port, database, name or [])


@vote_app.command("results")
def compute_ratings(
    folder: Annotated[Path, typer.Argument(help="Folder of the study.")], database: DatabaseOption = None
) -> None:
    """Compute the paper's Elo and Bradley-Terry ratings with intervals; writes ratings.json, .csv and .png there."""
    from evaluation.preference.study import export_results

    out.print_json(data=export_results(folder, database))
