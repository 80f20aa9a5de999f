"""`svd evaluate`: scores of folders of clips or of checkpoints, comparison of two evaluations, the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flows.cli.options import PresetOption, table_console
from svd.core.errors import UserError

evaluate_app = typer.Typer()
out = table_console()

FolderArgument = Annotated[
    Path, typer.Argument(help="Output of ucf101-evaluation, e.g. outputs/tiny/ucf101-evaluation.")
]


@evaluate_app.command("clips")
def score_clips(
    real: Annotated[Path, typer.Argument(help="Folder of real clips, searched through.")],
    generated: Annotated[Path, typer.Argument(help="Folder of generated clips, searched through.")],
    protocol: Annotated[list[str], typer.Option(help="Protocol; may be given several times.")] = ["svd_ucf101_paper"],  # noqa: B006
    weights: Annotated[
        str | None, typer.Option(help="File of the protocol's network, e.g. i3d_torchscript.pt.")
    ] = None,
    sha256: Annotated[str | None, typer.Option(help="Hash that the file must have.")] = None,
    offline: Annotated[bool, typer.Option(help="TransNetV2, whose weights are installed, as network.")] = False,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames per clip, instead of the protocol's.")] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Clips per folder, instead of the protocol's.")] = None,
    work: Annotated[Path, typer.Option(help="Where features are kept between runs.")] = Path("work/evaluate"),
    to: Annotated[Path | None, typer.Option(help="CSV file for the rows.")] = None,
) -> None:
    """Measure the distance between two folders of clips, one row per protocol, with its error bar and weights."""
    from evaluation.frechet.folders import protocols, score_folders
    from evaluation.tables import write_score_rows
    from svd.core.device import pick_device

    if not offline and weights is None:
        raise UserError("give the network's file with --weights (i3d_torchscript.pt of StyleGAN-V), or --offline")
    wanted = protocols(protocol, transnetv2=offline, frames=frames, samples=samples)
    rows = score_folders(real, generated, wanted, work, weights=weights, sha256=sha256, device=pick_device())
    table = Table(
        "protocol", "metric", "value", "± SE", "bias-corrected", "kernel (unbiased)", "real", "generated", "weights"
    )
    for row in rows:
        numbers = (row.value, row.standard_error, row.bias_corrected, row.kernel_unbiased)
        cells = ("–" if number is None else f"{number:.5g}" for number in numbers)
        table.add_row(row.protocol, row.metric, *cells, str(row.real), str(row.generated), row.weights)
    out.print(table)
    if to is not None:
        write_score_rows(to, rows)
        out.print(f"rows: {to}")


@evaluate_app.command("views")
def score_views(
    checkpoints: Annotated[list[str], typer.Argument(help="MODEL:STEP=FOLDER of a multi-view U-Net, any number.")],
    preset: PresetOption = "tiny",
    autoencoder: Annotated[
        Path | None, typer.Option(help="Default: outputs/PRESET/autoencoder.", show_default=False)
    ] = None,
    encoders: Annotated[Path | None, typer.Option(help="Default: outputs/PRESET/encoders.", show_default=False)] = None,
    to: Annotated[Path, typer.Option(help="Folder for curve.csv and curve.png.")] = Path("multiview-curve"),
    work: Annotated[Path, typer.Option(help="Where orbits are kept between runs.")] = Path("work/evaluate-views"),
) -> None:
    """Score multi-view checkpoints against training steps, as in Fig. 10b: CLIP-S and PSNR on one set of objects."""
    from evaluation.multiview.curve import read_checkpoint, score_checkpoints, write_curve
    from flows.places import Place
    from svd.config.load import load_preset

    chosen = load_preset(preset)
    networks = {
        "autoencoder": autoencoder or Place(chosen.name, "autoencoder").output,
        "encoders": encoders or Place(chosen.name, "encoders").output,
    }
    rows = score_checkpoints([read_checkpoint(text) for text in checkpoints], chosen, networks, work)
    write_curve(to, rows)
    table = Table("model", "step", "PSNR", "CLIP-S", "protocol")
    for row in rows:
        table.add_row(row["subject"], str(row["step"]), f"{row['psnr']:.3f}", f"{row['clip_s']:.4f}", row["protocol"])
    out.print(table)
    out.print(f"{to / 'curve.csv'}, {to / 'curve.png'}")


@evaluate_app.command("compare")
def compare_evaluations(candidate: FolderArgument, champion: FolderArgument) -> None:
    """Compare two evaluations of the same prompts and seeds, paired; below zero: the candidate is better."""
    from evaluation.frechet.gate import compare_scores

    kernel, frechet = compare_scores(candidate, champion)
    out.print(f"kernel distance  {kernel.value:+.6g} ± {kernel.standard_error:.2g}")
    out.print(f"Fréchet distance {frechet.value:+.6g} ± {frechet.standard_error:.2g}")


@evaluate_app.command("gate")
def check_candidate(
    candidate: FolderArgument,
    champion: Annotated[
        Path | None, typer.Argument(help="Evaluation of the present model; none: the first one.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Share of the champion's distance that it may be worse.")
    ] = 0.05,
    sigmas: Annotated[float, typer.Option(min=0, help="Standard errors that it may be worse.")] = 3.0,
) -> None:
    """Decide whether the candidate may replace the champion, and say why; exit with 1 if it may not."""
    from evaluation.frechet.gate import judge_candidate

    verdict = judge_candidate(candidate, champion, tolerance, sigmas)
    out.print(("passed: " if verdict.passed else "failed: ") + verdict.reason)
    if not verdict.passed:
        raise typer.Exit(1)


@evaluate_app.command("protocols")
def show_protocols() -> None:
    """List the named protocols and what each one fixes."""
    from evaluation.frechet.protocol import named_protocols

    table = Table("name", "digest", "network", "frames", "fps", "clips", "ddof", "rounding")
    for name, p in named_protocols().items():
        fps = "all" if p.fps is None else f"{p.fps:g}"
        table.add_row(
            name, p.digest(), p.net.name, str(p.frames), fps, str(p.generated or "all"), str(p.ddof), p.rounding
        )
    out.print(table)
