"""Multi-view scores against training steps (Fig. 10b): CLIP-S and PSNR of one or more models' checkpoints.

The paper draws SVD-MV, SD2.1-MV and Scratch-MV over their first 12,000 steps. Every checkpoint makes the same orbits of
the same objects from the same noise as in the benchmark (evaluation/multiview/benchmark.py).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from evaluation.multiview.benchmark import generate
from evaluation.multiview.perceptual import Perceptor
from evaluation.multiview.protocol import Pictures, make_protocol, render_truth
from evaluation.multiview.scores import Measures, rows, score
from evaluation.tables import write_csv
from svd.config import Preset
from svd.core.errors import UserError
from svd.latents.cache import digest
from svd.model.formats.folders import checkpoint_hash
from svd.orbits.renderer import open_renderer
from svd.storage import write_bytes
from svd.tasks.api import load_models


@dataclass(frozen=True)
class Checkpoint:
    """A U-Net of `model` after `step` training steps; folder: diffusers' layout, or one that holds it as `unet/`."""

    model: str
    step: int
    folder: Path

    @property
    def unet(self) -> Path:
        """The folder with config.json. Raises UserError when there is none."""
        for path in (self.folder / "unet", self.folder):
            if (path / "config.json").is_file():
                return path
        raise UserError(f"{self.folder}: no U-Net there; give a folder in diffusers' layout, or one that holds unet/")


def read_checkpoint(text: str) -> Checkpoint:
    """`MODEL:STEP=FOLDER`. Raises UserError for anything else."""
    name, _, folder = text.partition("=")
    model, _, step = name.rpartition(":")
    if not (model and folder and step.isdecimal()):
        raise UserError(f"'{text}': expected MODEL:STEP=FOLDER, for example SVD-MV:1000=checkpoints/1000/unet")
    return Checkpoint(model, int(step), Path(folder))


def score_checkpoints(
    checkpoints: Sequence[Checkpoint], preset: Preset, networks: Mapping[str, Path], work: Path
) -> list[dict[str, Any]]:
    """One row a checkpoint, model by model in the given order, by step; orbits are kept in `work`.

    networks: folders of `autoencoder` and `encoders`. Raises UserError for missing models, meshes and weights.
    """
    config, seed = preset.evaluation.multiview, preset.seed
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models_in_order = list(dict.fromkeys(checkpoint.model for checkpoint in checkpoints))
    ordered = sorted(checkpoints, key=lambda one: (models_in_order.index(one.model), one.step))
    places = [(checkpoint, checkpoint.unet) for checkpoint in ordered]
    perceptor = Perceptor(config.perceptual, config.lpips_weights, device)
    with open_renderer(config.renderer) as renderer:
        protocol = make_protocol(config, renderer.name)
        truth = render_truth(work / "truth" / protocol.digest, config, protocol, seed, renderer)
    found = []
    others = [checkpoint_hash(networks[name]) for name in ("autoencoder", "encoders")]
    for checkpoint, unet in tqdm(places, "checkpoints", unit="checkpoint"):
        models = load_models(unet, networks["autoencoder"], networks["encoders"], preset.encoders, device)
        weights = checkpoint_hash(unet)
        made_by = digest(weights, others, config.sampling.model_dump(), seed, protocol.digest)
        files = generate(work / "views" / made_by, models, truth, protocol, config.sampling, seed)
        measures = Measures(perceptor, models.encoders, device)
        scores = score(checkpoint.model, partial(_stored, files), truth, measures)
        row = rows([scores], truth, protocol, measures)[0]
        found.append({"subject": row.pop("subject"), "step": checkpoint.step, **row, "unet": weights[:12]})
    return found


def _stored(files: Sequence[Path], number: int) -> Pictures:
    return np.asarray(np.load(files[number]), np.uint8)


def write_curve(folder: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """`curve.csv` and `curve.png`: a colour a model, CLIP-S solid on the left axis and PSNR dotted on the right, as in
    Fig. 10b."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    write_csv(folder / "curve.csv", table)
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    left = FigureCanvasAgg(figure).figure.add_subplot()
    right = left.twinx()
    for number, model in enumerate(dict.fromkeys(row["subject"] for row in table)):
        own = [row for row in table if row["subject"] == model]
        steps = [row["step"] for row in own]
        colour = f"C{number}"
        left.plot(steps, [row["clip_s"] for row in own], "-", color=colour, marker="o", label=model)
        right.plot(steps, [row["psnr"] for row in own], ":", color=colour, marker="s", markerfacecolor="white")
    left.set_xlabel("training step")
    left.set_ylabel(f"CLIP-S (solid; {table[0]['clip_weights']})")
    right.set_ylabel("PSNR, dB (dotted)")
    left.grid(alpha=0.3)
    left.legend(fontsize=8, loc="lower right")
    left.set_title(f"novel views of {table[0]['objects']} unseen objects, {table[0]['protocol']}", fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    write_bytes(folder / "curve.png", stream.getvalue())
