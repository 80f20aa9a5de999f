"""What the words of a prompt are worth: by how much the loss rises when the prompt gets another one.

    python -m benchmarks.training.prompt_words [--preset tiny] [--clips 96]

Needs the outputs of the preset up to `high-quality-finetuning`, over the plain worlds. Test clips of the latents, each
with one noise (equal for all prompts), are denoised at each level under their own caption; one with another colour,
with another shape, with the opposite motion; and the empty one. A table: the loss under the caption, and how much the
others add to it, mean ± standard error over clips. A word that adds nothing isn't read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
import torch
from rich.progress import track
from torch import Tensor

from flows.places import Place
from svd.config import Preset
from svd.config.load import load_preset
from svd.diffusion import edm
from svd.diffusion.guidance import conditioned
from svd.latents.batches import Steps, in_order
from svd.latents.cache import LatentCache
from svd.latents.loader import Draws, Examples
from svd.model.formats.encoders import load_encoders
from svd.model.formats.folders import load_autoencoder, load_unet
from svd.synthetic.scenes import PLAIN_COLOURS, PLAIN_SHAPES
from svd.tasks.text_to_video import TEXT_TO_VIDEO

STAGE = "high-quality-finetuning"
SIGMAS = (0.5, 2.0, 8.0, 40.0)
OPPOSITES = (
    ("moving left", "moving right"),
    ("moving up", "moving down"),
    ("pans left", "pans right"),
    ("zooms in", "zooms out"),
)
BATCH = 16


def next_of(words: Sequence[str]) -> Callable[[str], str]:
    """Return what replaces the one of `words` that a caption's object has by the next of them."""
    return lambda caption: " ".join(
        words[(words.index(word) + 1) % len(words)] if word in words else word for word in caption.split(" ")
    )


def opposite(caption: str) -> str:
    """Replace the motion of a caption by its opposite."""
    for pair in OPPOSITES:
        for old, new in (pair, pair[::-1]):
            if old in caption:
                return caption.replace(old, new)
    raise ValueError(f"no motion in '{caption}'")


CHANGES: dict[str, Callable[[str], str]] = {
    "caption": str,
    "another colour": next_of(PLAIN_COLOURS),
    "another shape": next_of(PLAIN_SHAPES),
    "opposite motion": opposite,
    "no prompt": lambda caption: "",
}


def captions_of(folder: LatentCache, ids: Sequence[str]) -> list[str]:
    """Read the published captions of samples."""
    table = pl.read_parquet(folder.folder / "index.parquet", columns=["sample_id", "captions"])
    wanted = dict(table.iter_rows())
    return [next(c["text"] for c in wanted[name] if c["captioner"] == "sidecar") for name in ids]


def measure(preset: Preset, clips: int) -> dict[float, dict[str, Tensor]]:
    """Return the losses (N,) by noise level and change."""
    inputs = Place(preset.name, STAGE).inputs
    cache, phase = LatentCache(inputs["latents"]), preset.high_quality_finetuning.phases[-1]
    rows = cache.rows(phase, "test")
    examples = Examples(cache, rows, phase.frames, Draws(1, 0.0, 1.0, strata=1))
    count = min(clips, len(rows))
    captions = captions_of(cache, [str(examples.row(number)["sample_id"]) for number in range(count)])
    encoders = load_encoders(inputs["encoders"], preset.encoders)
    texts = {name: encoders.text([change(caption) for caption in captions]) for name, change in CHANGES.items()}
    unet = load_unet(Place(preset.name, STAGE).output / "unet").eval()
    autoencoder = load_autoencoder(inputs["autoencoder"])
    found: dict[float, dict[str, list[Tensor]]] = {sigma: {name: [] for name in CHANGES} for sigma in SIGMAS}
    for numbers in track(list(Steps(in_order(BATCH), range(-(-count // BATCH)))), "denoising"):
        numbers = [number for number in numbers if number < count]
        batch = torch.utils.data.default_collate([examples[number] for number in numbers])
        for name, text in texts.items():
            network = conditioned(unet, TEXT_TO_VIDEO.condition({**batch, "text": text[numbers]}, unet, autoencoder))
            for sigma in SIGMAS:
                levels = torch.full((len(numbers),), sigma)
                found[sigma][name].append(edm.loss(network, batch["latents"], levels, batch["noise"], edm.KINDS["edm"]))
    return {sigma: {name: torch.cat(parts) for name, parts in by.items()} for sigma, by in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--clips", type=int, default=96)
    options = parser.parse_args()
    with torch.no_grad():
        losses = measure(load_preset(options.preset), options.clips)
    others = [name for name in CHANGES if name != "caption"]
    print(f"| σ | loss | {' | '.join(others)} |\n|{'---|' * (2 + len(others))}")
    for sigma, by in losses.items():
        cells = [f"{sigma:g}", f"{by['caption'].mean():.3f}"]
        for name in others:
            more = (by[name] - by["caption"]).numpy()
            cells.append(f"{more.mean():.3f} ± {more.std(ddof=1) / np.sqrt(len(more)):.3f}")
        print(f"| {' | '.join(cells)} |")
    print(f"N = {len(by['caption'])} clips, one noise each")


if __name__ == "__main__":
    main()
