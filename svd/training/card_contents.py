"""What the model card of each stage says: the data it learned from, its phases, its parents and its limits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from svd.config import Phase, Preset, TrainingConfig
from svd.core.addresses import public_address
from svd.core.errors import UserError
from svd.latents.cache import LatentCache
from svd.model.formats.folders import checkpoint_hash, part_of
from svd.model.formats.hub import UNET_FILES, VAE_FILES, resolve_weights
from svd.model.safetensors import file_hash
from svd.stage import StageContext
from svd.tasks.base import Task
from svd.training.model_card import CARD, UNKNOWN, Card, Parent, front_matter, licence_of

PIPELINE_TAGS = {"image": "text-to-image", "text-to-video": "text-to-video"}  # of other tasks: image-to-video


def training_card(
    stage: str, task: Task, config: TrainingConfig, cache: LatentCache, context: StageContext, source: Path | None
) -> Card:
    """Return the card of a network that `stage` trained on a latent cache.

    source: where its first weights were read from; None: they were fresh.
    """
    phases, last = config.phases, config.phases[-1]
    motions = getattr(config, "motions", [None])  # each its own adapter, trained on its own draws
    facts = {
        "read from": ", ".join(f"`{name}`" for name in ("latents", "orbits") if name in context.inputs),
        "SHA-256 of the index of samples": f"`{file_hash(cache.folder / 'index.parquet')}`",
        "samples drawn": _samples_drawn(phases, len(motions)),
    }
    facts |= {f"phase {number}": described(phase) for number, phase in enumerate(phases, start=1)}
    limits = (
        f"It learned {last.frames} frames of {last.height}x{last.width} last; others weren't measured.",
        "The validation losses are means over noise levels on test clips of the same sources, and don't say how clips "
        "look; `linear` is the loss of a linear filter on the same samples, margins are in standard errors.",
    )
    pipeline = PIPELINE_TAGS.get(task.name, "image-to-video")
    tags = tuple(dict.fromkeys((pipeline, task.name, "stable-video-diffusion")))
    return Card(stage, tags, facts, training_parents(context, source), limits, pipeline=pipeline)


def _samples_drawn(phases: Sequence[Phase], models: int) -> int | str:
    most = models * sum(phase.iterations * max(size.batch_size for size in phase.by_bucket) for phase in phases)
    return f"at most {most}" if any(phase.buckets for phase in phases) else most


def described(phase: Phase) -> str:
    """Describe a phase of a training in one line."""
    batches = " or ".join(f"{size.batch_size} x {size.size}" for size in phase.by_bucket)
    return (
        f"{phase.iterations} steps of {batches}, log σ ~ N({phase.p_mean}, {phase.p_std}²), trained: {phase.trainable}"
    )


def autoencoder_card(context: StageContext, clips: Iterable[str]) -> Card:
    """Return the card of the autoencoder, which was trained on these clips."""
    preset = context.preset
    options, given = preset.autoencoder, preset.model.autoencoder
    images = f"{options.height}x{options.width}"
    seen = hashlib.sha256("\n".join(sorted(clips)).encode()).hexdigest()
    facts = {
        "read from": "`curation`",
        "SHA-256 of the ids of the training clips": f"`{seen}`",
        "image phase": f"{options.iterations} steps of {options.batch_size} images of {images}",
        "temporal phase": f"{options.temporal_iterations} steps on clips of {options.frames} frames of {images}",
    }
    parents = (released("first weights", given.pretrained, preset.licences, "vae"),) if given.pretrained else ()
    limits = ("Measured on held-out clips of the same sources; PSNR and L1 don't say how a reconstruction looks.",)
    return Card("autoencoder", ("autoencoder", "stable-video-diffusion"), facts, parents, limits)


def encoders_card(context: StageContext, clips: int, steps: int) -> Card:
    """Return the card of the toy CLIP, which was trained on this many rendered clips for so many steps."""
    worlds = ", ".join(context.preset.encoders.toy_worlds)
    facts = {
        "read from": f"clips of synthetic worlds ({worlds}), rendered by the stage",
        "clips": clips,
        "steps": steps,
    }
    limits = ("It knows the words and pictures of the synthetic worlds alone.",)
    pipeline = "zero-shot-image-classification"
    return Card("encoders", ("clip",), facts, (), limits, library="open_clip", pipeline=pipeline)


def training_parents(context: StageContext, source: Path | None) -> tuple[Parent, ...]:
    """Return the parents of a training: the network it starts from, the autoencoder and the encoders."""
    preset, parents = context.preset, list[Parent]()
    if source is not None and source.parent in context.inputs.values():
        parents.append(_made_here("first weights", source.parent))
    elif source is not None and preset.model.pretrained:
        parents.append(released("first weights", preset.model.pretrained, preset.licences, "unet"))
    parents.append(_made_here("autoencoder", context.inputs["autoencoder"]))
    if "encoders" in context.inputs:
        parents.append(_encoders(context.inputs["encoders"], preset))
    return tuple(parents)


def _made_here(role: str, folder: Path) -> Parent:
    """Describe the output of a stage; licence and origin are those of its card."""
    card = folder / CARD
    models = front_matter(card).get("base_model", [])
    try:
        weights = checkpoint_hash(part_of(folder, "unet"))
    except UserError:  # no weights there: a card must not end a training
        weights = UNKNOWN
    return Parent(role, f"`{folder.name}`", weights, licence_of(card), tuple(models))


def _encoders(folder: Path, preset: Preset) -> Parent:
    config = preset.encoders
    if config.kind == "toy-clip":
        return _made_here("encoders", folder)
    name = f"{config.model} {public_name(config.weights)}"
    return Parent("encoders", name, config.sha256 or UNKNOWN, _licence(config.weights, preset.licences))


def _licence(weights: str, licences: Mapping[str, str]) -> str:
    """Return the licence that the preset gives for weights: under their name, or that of their file."""
    return licences.get(weights) or licences.get(Path(weights).name) or UNKNOWN


def released(role: str, weights: str, licences: Mapping[str, str], part: str) -> Parent:
    """Describe released weights as the preset names them: a file, a folder, or a repository on the hub.

    licences: the preset's. part: `unet` or `vae`, which is read of a whole pipeline.
    """
    path = resolve_weights(weights, UNET_FILES if part == "unet" else VAE_FILES)
    digest = file_hash(path) if path.is_file() else checkpoint_hash(part_of(path, part))
    hub = () if Path(weights).expanduser().exists() else (weights,)
    return Parent(role, hub[0] if hub else public_name(weights), digest, _licence(weights, licences), hub)


def public_name(weights: str) -> str:
    """Return the name of weights without the folders of this machine.

    >>> public_name("/data/ann/sd21.safetensors"), public_name("laion2b_s32b_b79k")
    ('sd21.safetensors', 'laion2b_s32b_b79k')
    """
    return public_address(weights) if "://" in weights else Path(weights).name
