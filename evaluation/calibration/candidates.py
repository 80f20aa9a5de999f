"""The models of the threshold calibration: subsets of one start set, a small model trained on each, its clips (E.2.2).

The start set is drawn from the *unfiltered* catalogue, so it is encoded here: the stage `latents` caches kept clips
alone. All models share initial weights, noise and order of draws; only the clips that they see (on the axis `captions`,
the captions) differ. The unfiltered model is trained once for all axes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from svd.catalogue import filters
from svd.catalogue.subsets import UNFILTERED, calibration_subsets
from svd.catalogue.tables import read_clips
from svd.config import CalibrationConfig, Geometry, Phase, Preset
from svd.core.errors import UserError
from svd.curation.captions.base import MOTION
from svd.diffusion.edm import KINDS
from svd.generation import load_models, text_to_video
from svd.latents.cache import LatentCache, digest
from svd.latents.index import Rows
from svd.latents.stage import LatentEncoder, assemble, encode_clips, with_split
from svd.media.video import to_uint8, write_mp4
from svd.model.formats.folders import load_autoencoder, load_unet
from svd.model.formats.hub import UNET_FILES, resolve_weights
from svd.model.unet import UNet
from svd.stage import StageContext, Tracker
from svd.tasks.text_to_video import TEXT_TO_VIDEO
from svd.training.initialise import carry_over, fresh_unet, unet_config
from svd.training.launch import on_all_ranks
from svd.training.ranks import rank
from svd.training.runner import Training, measured, run_phases

NAME = "threshold-calibration"
CLIPS_AT_ONCE = 8


@dataclass(frozen=True)
class Candidate:
    """A model of the calibration: the share removed on one axis (0: unfiltered), or the captioner that it reads."""

    name: str
    axis: str
    removed: float = 0.0
    captioner: str = ""

    @property
    def label(self) -> str:
        """The captioner, or the percentage removed."""
        return self.captioner or f"{100 * self.removed:g}"


def candidates(preset: Preset) -> dict[str, list[Candidate]]:
    """Return the models of every axis, fewest removed first; all axes share the unfiltered one, whose axis is "".

    Raises UserError when an axis has nothing to compare.
    """
    found: dict[str, list[Candidate]] = {}
    for axis in preset.threshold_calibration.axes:
        if axis == "captions":
            captioners = preset.curation.captions.captioners
            found[axis] = [Candidate(f"captions-{name}", axis, captioner=name) for name in captioners]
        else:
            shares = sorted(set(preset.threshold_calibration.removed))
            found[axis] = [
                Candidate(f"{axis}-{100 * share:g}", axis, share) if share else Candidate(UNFILTERED, "")
                for share in shares
            ]
        if len(found[axis]) < 2:
            option = "curation.captions.captioners" if axis == "captions" else "threshold_calibration.removed"
            raise UserError(f"'{option}': the axis '{axis}' needs at least two models to compare; give more values")
    return found


def start_set(curation: Path, config: CalibrationConfig, seed: int) -> pl.DataFrame:
    """Draw `config.clips` training and `config.validation_samples` test clips of the unfiltered catalogue, by seed."""
    clips = with_split(read_clips(curation)).sort("clip_id")
    parts = []
    for split, count in (("train", config.clips), ("test", config.validation_samples)):
        of_split = clips.filter(pl.col("split") == split)
        order = np.random.default_rng([seed, len(split)]).permutation(len(of_split))[:count]
        parts.append(of_split[order.tolist()])
    return pl.concat(parts)


@dataclass(frozen=True)
class TrainingSubset:
    """The training clips of a candidate, and by axis the thresholds that chose them."""

    clips: frozenset[str]
    thresholds: Mapping[str, float]


def training_subset(start: pl.DataFrame, candidate: Candidate) -> TrainingSubset:
    """Choose the training clips of the start set that a candidate sees; thresholds are quantiles over them all.

    Clips at the threshold stay, so fewer than the share may be removed. Raises UserError for an axis without scores.
    """
    clips = start.filter(pl.col("split") == "train")
    if candidate.captioner:
        own = pl.col("captions").list.eval(pl.element().struct.field("captioner"))
        chosen = clips.filter(own.list.contains(candidate.captioner).fill_null(False))
        if chosen.is_empty():
            raise UserError(f"no clip has a caption by '{candidate.captioner}'; curate with it, or drop the captioner")
        return TrainingSubset(frozenset(chosen["clip_id"]), {})
    if not candidate.removed:
        return TrainingSubset(frozenset(clips["clip_id"]), {})
    wanted = calibration_subsets([candidate.axis], [candidate.removed])[candidate.name]
    judged, thresholds = filters.apply(clips.lazy(), wanted)
    if candidate.axis not in thresholds:
        raise UserError(
            f"the catalogue has no scores for '{candidate.axis}'; give the weights that score it, "
            "or leave it out of 'threshold_calibration.axes'"
        )
    return TrainingSubset(frozenset(judged.filter(pl.col("keep")).collect()["clip_id"]), thresholds)


def choose_prompts(start: pl.DataFrame, preset: Preset) -> dict[str, str]:
    """Choose the fixed prompts, by id: different captions of test clips, by each content captioner in turn.

    The paper's 64 prompts are not published. Raises UserError when there are too few captions.
    """
    content = [str(name) for name in preset.curation.captions.captioners if name != MOTION] or [MOTION]
    texts: dict[str, None] = {}
    for number, captions in enumerate(start.filter(pl.col("split") == "test")["captions"].to_list()):
        by_captioner = {c["captioner"]: c["text"] for c in captions or []}
        turn = content[number % len(content) :] + content[: number % len(content)]
        if text := next((by_captioner[name] for name in turn if name in by_captioner), None):
            texts.setdefault(text)
    wanted = preset.threshold_calibration.prompts
    if len(texts) < wanted:
        raise UserError(
            f"the test clips have {len(texts)} different captions, 'threshold_calibration.prompts' wants {wanted}; "
            "lower it, or raise 'validation_samples'"
        )
    return {f"prompt-{number:03d}": text for number, text in enumerate(list(texts)[:wanted])}


def encode_start_set(context: StageContext, start: pl.DataFrame) -> LatentCache:
    """Make the latent cache of the start set, at the sizes of the calibration's phases, in `context.work`."""
    work = context.work / "latents"
    if not (work / "finished" / "latents.json").is_file():
        phases = context.preset.threshold_calibration.phases
        sizes = sorted({(size.frames, size.height, size.width) for phase in phases for size in phase.by_bucket})
        geometries = [Geometry(frames=frames, height=height, width=width) for frames, height, width in sizes]
        latents = context.preset.latents.model_copy(update={"geometries": geometries})
        preset = context.preset.model_copy(update={"latents": latents})
        encoder = LatentEncoder(context.inputs["autoencoder"], context.inputs["encoders"], context)
        assemble(work, encode_clips(start, preset, context.inputs["curation"], encoder, work), encoder)
    return LatentCache(work / "finished")


@dataclass(frozen=True)
class ModelTracker:
    """A tracker that puts the model's name before every key: all models count their steps from 0."""

    inner: Tracker
    model: str

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log scalars at a step of this model."""
        self.inner.log_metrics({f"{self.model}/{key}": value for key, value in metrics.items()}, step)

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """Log an image at a step of this model."""
        self.inner.log_image(f"{self.model}/{key}", image, step)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Log a file of this model."""
        self.inner.log_file(path, f"{self.model}/{folder}")


def model_training(context: StageContext, candidate: Candidate, clips: frozenset[str], cache: LatentCache) -> Training:
    """Return the training of one candidate.

    All have the same name, and so the same seed, initial weights and draws.
    """
    preset, config = context.preset, context.preset.threshold_calibration
    if candidate.captioner:
        captions = preset.curation.captions.model_copy(update={"probabilities": {candidate.captioner: 1.0}})
        curation = preset.curation.model_copy(update={"captions": captions})
        preset = preset.model_copy(update={"curation": curation})
    own = replace(context, preset=preset, tracker=ModelTracker(context.tracker, candidate.name))
    autoencoder = load_autoencoder(context.inputs["autoencoder"]).requires_grad_(False)
    phase = config.phases[-1]
    size = phase.height // autoencoder.factor, phase.width // autoencoder.factor
    # The paper starts from SD 2.1 itself, which was trained on discrete noise levels. Without it: our image model.
    pretrained = preset.model.pretrained
    source = resolve_weights(pretrained, UNET_FILES) if pretrained else context.inputs["image-pretraining"] / "unet"

    def initial() -> UNet:
        sizes = unet_config(preset, TEXT_TO_VIDEO, size)
        unet = fresh_unet(sizes, preset.seed, NAME, preset.model.unet.position_gain)
        return carry_over(load_unet(source), unet, str(source))

    def rows(phase: Phase, split: str) -> Rows:
        found = cache.rows(phase, split)
        return found.where(pl.col("clip_id").is_in(sorted(clips))) if split == "train" else found

    work = context.work / "models" / candidate.name
    compute = preset.compute.of(NAME)
    return Training(NAME, own, TEXT_TO_VIDEO, config, compute, cache, autoencoder, rows, initial, work)


@on_all_ranks("threshold_calibration")
def train_models(
    context: StageContext, models: Sequence[Candidate], subsets: Mapping[str, TrainingSubset], cache: LatentCache
) -> dict[str, dict[str, Any]]:
    """Train every candidate into `context.work/models/<name>`, keeping finished ones; returns their facts by name."""
    facts = {}
    for candidate in tqdm(models, desc="models", unit="model"):
        chosen = subsets[candidate.name]
        training = model_training(context, candidate, chosen.clips, cache)
        last, history = run_phases(training)
        if rank() == 0:
            (training.work / "losses.csv").write_text(history.csv())
        facts[candidate.name] = {
            **{key: value for key, value in measured(training, history).items() if key != "steps"},
            "axis": candidate.axis,
            "removed": candidate.removed,
            "captioner": candidate.captioner,
            "clips": len(chosen.clips),
            "thresholds": dict(chosen.thresholds),
            "phase": last.name,
        }
    return facts


def sample_models(
    context: StageContext,
    facts: Mapping[str, Mapping[str, Any]],
    prompts: Mapping[str, str],
    cache: LatentCache,
    device: str,
) -> Path:
    """Write `context.work/samples/<model>/<prompt id>.mp4`; a prompt's seed is the same for all models.

    Frame rate and amount of motion are the medians of the start set, for all models. Finished clips are kept.
    """
    config, folder = context.preset.threshold_calibration, context.work / "samples"
    phase = config.phases[-1]
    kind = KINDS[config.objective]
    known = cache.rows(phase, "train")
    fps, motion = (float(statistics.median(known.column(name).to_list())) for name in ("fps", "motion_bucket"))
    for name, fact in tqdm(facts.items(), desc="samples", unit="model"):
        missing = [key for key in prompts if not (folder / name / f"{key}.mp4").is_file()]
        if not missing:
            continue
        inputs, unet = context.inputs, context.work / "models" / name / fact["phase"] / "unet"
        models = load_models(
            unet, inputs["autoencoder"], inputs["encoders"], context.preset.encoders, device, kind=kind
        )
        for start in range(0, len(missing), CLIPS_AT_ONCE):
            keys = missing[start : start + CLIPS_AT_ONCE]
            clips = text_to_video(
                models,
                [prompts[key] for key in keys],
                frames=phase.frames,
                height=phase.height,
                width=phase.width,
                fps=fps,
                motion_bucket=motion,
                sampling=config.sampling,
                seed=[prompt_seed(context.preset.seed, key) for key in keys],
                progress=False,
            )
            for key, clip in zip(keys, clips, strict=True):
                write_mp4(folder / name / f"{key}.mp4", to_uint8(clip.numpy()), fps, {"prompt": prompts[key]})
    return folder


def prompt_seed(seed: int, prompt: str) -> int:
    """Return the seed of a prompt's noise."""
    return int(digest(NAME, seed, prompt)[:12], 16)
