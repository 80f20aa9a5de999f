"""`svd export`: a trained model or a curated data set, as others read them."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.cli.options import PresetOption, console, table_console
from svd.core.errors import UserError

if TYPE_CHECKING:
    from svd.storage import Location

export_app = typer.Typer(no_args_is_help=True)
out = table_console()
TABLES = ("catalogue/clips.parquet", "catalogue/verdicts.parquet", "catalogue/subsets.parquet")
PATIENCE = 2.0  # seconds without a progress bar


@export_app.command("model")
def export_model(
    model: Annotated[Path, typer.Argument(help="Output of a training stage, e.g. outputs/tiny/image-to-video.")],
    target: Annotated[Path, typer.Argument(help="Folder (diffusers) or .safetensors file (sgm); must not exist.")],
    to: Annotated[Literal["sgm", "diffusers"], typer.Option(help="Layout of the target.")] = "diffusers",
    preset: PresetOption = "tiny",
) -> None:
    """Put a trained model, its autoencoder and its image encoder into one folder or file that others can load.

    A folder has the model card, too.
    """
    from svd.config.load import load_preset
    from svd.model.formats.export import export_networks

    out.print(export_networks(model, target, to, load_preset(preset).encoders))


@export_app.command("dataset")
def export_clips(
    catalogue: Annotated[
        str,
        typer.Argument(
            help="Output of the stage curation, e.g. outputs/tiny/curation, or the address of a copy of it."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write; must not exist. It appears when it is complete.")],
    to: Annotated[
        Literal["webdataset", "datasets", "folder"],
        typer.Option(help="Tars; mp4s with metadata.parquet for `datasets`; or mp4s with a JSON and a text each."),
    ] = "webdataset",
    subset: Annotated[str | None, typer.Option(help="A named subset instead of the kept clips.")] = None,
    verdict: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead, the clips with this verdict: kept, or the axis that dropped them; may be repeated."
        ),
    ] = None,
    hold_out: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the sources for the split `test`, beside the catalogue's own."),
    ] = 0.0,
    caption: Annotated[
        str | None, typer.Option(metavar="CAPTIONER", help="Whose text is the caption (default: the first of a clip).")
    ] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, metavar="BYTES", help="Size of a tar.")] = 1_000_000_000,
    store: Annotated[
        str | None,
        typer.Option("--store", envvar="SVD_STORE", help="Where outputs/PRESET/curation is read when it isn't here."),
    ] = None,
) -> None:
    """Write the kept clips, or others, with captions, licences, sources and scores as a data set in splits.

    From a store and from an address come the tables and, by ranges, the chosen clips alone.
    """
    from svd.catalogue.export.dataset import export_dataset
    from svd.catalogue.export.selection import Selection

    selection = Selection(subset, verdict or (), hold_out)
    with _located(catalogue, store) as (folder, locate), _progress() as advance:
        about = export_dataset(folder, locate, target, to, selection, caption, shard_bytes, advance)
    clips = ", ".join(f"{count} {split}" for split, count in sorted(about["clips"].items()))
    out.print(f"{target}: {clips}, {about['bytes'] / 1e6:,.1f} MB")


@contextmanager
def _located(catalogue: str, store: str | None) -> Iterator[tuple[Path, Callable[[str], Location]]]:
    """Yield a local folder with the tables of a catalogue, and the function that says where its files lie."""
    from svd import storage

    if storage.is_address(catalogue):
        locate: Callable[[str], Location] = functools.partial(storage.join, catalogue)
    elif store and not Path(catalogue).exists():
        locate = _in_store(catalogue, store)
    else:
        yield Path(catalogue), Path(catalogue).joinpath
        return
    with tempfile.TemporaryDirectory() as name:
        for relative in TABLES:
            with suppress(FileNotFoundError):
                storage.download(locate(relative), Path(name) / relative)
        if not (Path(name) / TABLES[0]).exists():
            raise UserError(f"{catalogue}: no clip catalogue there; give the output folder of `svd curate`")
        yield Path(name), locate


def _in_store(catalogue: str, store: str) -> Callable[[str], str]:
    """Return the function that locates files of a stage's newest output in a store by their hashes."""
    from flows.places import Place
    from flows.recording.dvc import stored_object
    from flows.recording.results_store import stored_files, stored_output

    place = Place.of_output(catalogue)
    output = stored_output(store, place.preset, place.stage)
    if output is None:
        raise UserError(
            f"{store}: has no {catalogue}; `svd stage {place.stage} -p {place.preset} --store …` puts it there"
        )
    hashes = {item["relpath"]: item["md5"] for item in stored_files(store, output)}

    def locate(relative: str) -> str:
        if relative not in hashes:
            raise FileNotFoundError(relative)
        return stored_object(store, hashes[relative])

    return locate


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a function that is told how far the work is; a bar appears when it takes longer than PATIENCE."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("clips"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=os.environ.get("SVD_NO_PROGRESS") == "1")
    task, began = bar.add_task("clips"), time.monotonic()

    def advance(done: int, total: int) -> None:
        if time.monotonic() - began > PATIENCE:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
