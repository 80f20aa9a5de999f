"""Multi-view scores against training steps (Fig. 10b): CLIP-S and PSNR of one or more models' checkpoints.

The paper draws SVD-MV, SD2.1-MV and Scratch-MV over their first 12,000 steps. Every checkpoint generates the orbits of
the benchmark (evaluation/multiview/benchmark.py): same objects, same noise.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation.multiview.benchmark import generate
from evaluation.multiview.image_metrics import Perceptor
from evaluation.multiview.protocol import Views, render_truth, view_protocol
from evaluation.multiview.scores import Measures, rows, score
from evaluation.tables import write_csv
from svd.config import Preset
from svd.core.device import pick_device
from svd.core.errors import UserError
from svd.generation import load_models
from svd.latents.cache import digest
from svd.model.formats.folders import checkpoint_hash
from svd.orbits.renderer import open_renderer
from svd.storage import write_bytes


@dataclass(frozen=True)
class ScoredCheckpoint:
    """A U-Net of `model` after `step` training steps.

    folder: in diffusers' layout, or one that holds such a folder as `unet/`.
    """

    model: str
    step: int
    folder: Path

    @property
    def unet(self) -> Path:
        """The folder with config.json; raises UserError when there is none."""
        for path in (self.folder / "unet", self.folder):
            if (path / "config.json").is_file():
                return path
        raise UserError(f"{self.folder}: no U-Net there; give a folder in diffusers' layout, or one that holds unet/")


def read_checkpoint(text: str) -> ScoredCheckpoint:
    """Read `MODEL:STEP=FOLDER`; raises UserError for anything else.

    >>> read_checkpoint("SVD-MV:1000=checkpoints/1000").step
    1000
    """
    name, _, folder = text.partition("=")
    model, _, step = name.rpartition(":")
    if not (model and folder and step.isdecimal()):
        raise UserError(f"'{text}': expected MODEL:STEP=FOLDER, for example SVD-MV:1000=checkpoints/1000/unet")
    return ScoredCheckpoint(model, int(step), Path(folder))


def score_checkpoints(
    checkpoints: Sequence[ScoredCheckpoint], preset: Preset, networks: Mapping[str, Path], work: Path
) -> list[dict[str, Any]]:
    """Return one row per checkpoint, model by model in the given order, then by step; orbits are kept in `work`.

    networks: folders of `autoencoder` and `encoders`. Raises UserError for missing models, meshes and weights.
    """
    config, seed = preset.evaluation.multiview, preset.seed
    device = pick_device()
    models_in_order = list(dict.fromkeys(checkpoint.model for checkpoint in checkpoints))
    ordered = sorted(checkpoints, key=lambda one: (models_in_order.index(one.model), one.step))
    places = [(checkpoint, checkpoint.unet) for checkpoint in ordered]
    perceptor = Perceptor(config.perceptual, config.lpips_weights, device)
    with open_renderer(config.renderer) as renderer:
        protocol = view_protocol(config, renderer.name)
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


def _stored(files: Sequence[Path], number: int) -> Views:
    return np.asarray(np.load(files[number]), np.uint8)


def write_curve(folder: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Write `curve.csv`, and `curve.png` as in Fig. 10b.

    Each model has a colour; CLIP-S is solid, on the left axis, PSNR dotted, on the right one.
    """
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
