"""The options that the commands of `svd generate` share, as dataclasses that `with_options` turns into options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from svd.config import Sampling, Solver

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Networks:
    """Options of the networks: which ones, where they are, and how they run."""

    preset: Annotated[
        str, typer.Option("--preset", "-p", help="Preset whose networks, sizes and sampling are the defaults.")
    ] = "tiny"
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="U-Net folder, or a released model's folder, file, or hub id.")
    ] = None
    autoencoder: Annotated[
        Path | None, typer.Option(help="Autoencoder folder.", show_default="the pipeline's or the preset's")
    ] = None
    encoders: Annotated[
        Path | None, typer.Option(help="Encoders folder.", show_default="the pipeline's or the preset's")
    ] = None
    lora: Annotated[
        list[str] | None, typer.Option(help="LoRA folder, or FOLDER:SCALE; may be given several times.")
    ] = None
    objective: Annotated[
        Literal["edm", "discrete-v", "discrete-eps"],
        typer.Option(help="What the U-Net was trained with; discrete-v: ablations, SD 2.1; discrete-eps: SD 2.1-base."),
    ] = "edm"
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU when there is one.")] = "auto"
    dtype: Annotated[Dtype, typer.Option(help="auto: bfloat16 on a GPU.")] = "auto"
    offload: Annotated[bool, typer.Option("--offload", help="Keep networks off the device while they don't work.")] = (
        False
    )
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Run the two passes of guidance one by one: half the memory.")
    ] = False
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the U-Net, which takes minutes at the first clip of a size."),
    ] = False
    decode_chunk: Annotated[int, typer.Option(min=1, help="Frames decoded together; fewer need less memory.")] = 16
    decode_overlap: Annotated[int, typer.Option(min=0, help="Frames that neighbouring decoding chunks share.")] = 4


@dataclass(frozen=True)
class Solving:
    """Options of the solver."""

    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the solver.", show_default="the preset's")] = None
    solver: Annotated[Solver | None, typer.Option(help="Solver.", show_default="the preset's")] = None
    sigma_max: Annotated[
        float | None, typer.Option(min=0.01, help="Highest noise level.", show_default="the preset's")
    ] = None

    def sampling(self, base: Sampling, guidance: float | None = None) -> Sampling:
        """Return `base`, the preset's sampling, changed by the options that were given."""
        given = {**dataclasses.asdict(self), "guidance": guidance}
        return Sampling.model_validate(base.model_dump() | {k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True)
class Motion:
    """Options of the micro-conditioning."""

    fps: Annotated[float | None, typer.Option(min=1, help="Frames per second, for the model and of the file.")] = None
    motion: Annotated[int, typer.Option(min=0, max=511, help="Motion bucket; 0 still, 255 the liveliest trained.")] = (
        127
    )


@dataclass(frozen=True)
class Size:
    """Options of a clip's size."""

    frames: Annotated[int | None, typer.Option(min=1, help="Frames.", show_default="as the preset trains")] = None
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="as the preset trains")] = None
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="as the preset trains")] = None


@dataclass(frozen=True)
class Results:
    """Options of the results: seeds, files, and what is done to clips before they are written."""

    out: Annotated[Path, typer.Option("--out", "-o", help="Folder, or for a single clip a file.")] = Path("generated")
    format: Annotated[
        Literal["mp4", "gif", "png"], typer.Option(help="Of the files in a folder; png: a folder of images per clip.")
    ] = "mp4"
    seed: Annotated[int, typer.Option(min=0, help="Of the first clip; the next clips have the next numbers.")] = 0
    count: Annotated[int, typer.Option(min=1, help="Clips for each prompt or image.")] = 1
    batch: Annotated[int, typer.Option(min=1, help="Clips generated together; changes speed and memory only.")] = 1
    watermark: Annotated[bool, typer.Option("--watermark", help="Put an invisible watermark into the frames.")] = False
    safety_heads: Annotated[
        Path | None, typer.Option(help="Heads (.npz) of a safety filter; clips that it flags are blurred.")
    ] = None
    safety_model: Annotated[str, typer.Option(help="open_clip model that the heads belong to.")] = "ViT-L-14"
    safety_weights: Annotated[str, typer.Option(help="Its weights: an open_clip name, or a file.")] = "openai"


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Make a typer command of a function: its dataclass parameters become options, one per field."""
    hints = typing.get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in groups
    ]
    for group in groups.values():
        types = typing.get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name])
            for f in dataclasses.fields(typing.cast(Any, group))
        ]

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, group in groups.items():
            names = [f.name for f in dataclasses.fields(typing.cast(Any, group))]
            values[name] = typing.cast(Any, group)(**{field: values.pop(field) for field in names})
        function(**values)

    del command.__wrapped__  # type: ignore[attr-defined]
    ordered = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    command.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in ordered}
    return command
