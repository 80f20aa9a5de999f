"""Stage `ucf101-evaluation`: zero-shot Fréchet distance on UCF-101 (App. E.4), with controls and error bars.

One clip per prompt of the official list is sampled, brought to the paper's size, and compared with the real clips by
the features of a fixed network. The same run scores controls: noise, the mean frame, an untrained network of the same
shape, and real clips against real clips. A score can only be read between these.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.frechet.batches import Collector, FeatureSet, noise_clips, repeated
from evaluation.frechet.comparison_grid import comparison_grid
from evaluation.frechet.distances import distance
from evaluation.frechet.features import Extractor, check_overlap, load_extractor, metric_name
from evaluation.frechet.moments import MomentState, packed, save_state
from evaluation.frechet.protocol import (
    I3D,
    TRANSNETV2,
    VIDEOMAE,
    EvalProtocol,
    covering_steps,
    named_protocols,
    paper_steps,
)
from evaluation.frechet.results import Result, Score, paper_rows, result_json
from evaluation.frechet.ucf101_data import (
    Dataset,
    Item,
    captions,
    group_numbers,
    prompt_list,
    read_dataset,
    read_real,
    spread,
)
from evaluation.tables import Row, markdown_table, write_score_rows
from evaluation.untrained import untrained
from svd.config import Ucf101Config
from svd.core.device import pick_device
from svd.core.errors import UserError
from svd.core.files import write_json
from svd.generation import Models, load_models, text_to_video
from svd.media.video import write_mp4, write_png
from svd.model.formats.folders import checkpoint_hash
from svd.stage import Report, StageContext, Tracker, publish
from svd.storage import write_bytes

FIXTURE = "ucf101_fixture"


@dataclass(frozen=True)
class Evaluation:
    """All that stays the same while an evaluation runs."""

    config: Ucf101Config
    seed: int
    dataset: Dataset
    name: str
    items: list[Item]
    protocol: EvalProtocol
    extractor: Extractor
    collector: Collector

    @property
    def metric(self) -> str:
        """The metric's name: `fvd` or `frechet_<network>`."""
        return metric_name(self.extractor.net, self.extractor.sha256)

    @property
    def shown(self) -> list[int]:
        """The numbers of the items that are shown."""
        return spread([item.number for item in self.items], self.config.shown)


def ucf101_protocol(config: Ucf101Config, dataset: str, real: int, extractor: Extractor) -> EvalProtocol:
    """Return the protocol of a configuration: the paper's, its name followed by the values that are changed.

    real: the number of real clips.
    """
    return named_protocols()["svd_ucf101_paper"].changed(
        dataset=dataset,
        net=replace(extractor.net, sha256=extractor.sha256),
        steps=paper_steps(config.resized, config.cropped),
        real_steps=covering_steps(*config.cropped),
        frames=config.frames,
        fps=float(config.fps),
        prompt="class" if dataset == "ucf101" else "caption",
        real=real,
        generated=config.samples,
    )


def sampling(config: Ucf101Config) -> dict[str, Any]:
    """Return how clips are sampled: all that decides about a generated clip besides the weights."""
    size = {name: getattr(config, name) for name in ("height", "width", "frames", "fps", "motion_bucket")}
    return {**size, **config.sampling.model_dump()}


def prepare(context: StageContext, device: str = "cpu") -> Evaluation:
    """List the real clips, load the feature network, fix the protocol; raises UserError for what is missing."""
    config = context.preset.evaluation.ucf101
    name = FIXTURE if config.dataset is None else "ucf101"
    folder = context.inputs["sources"] / FIXTURE if config.dataset is None else Path(config.dataset).expanduser()
    dataset = read_dataset(folder, official=config.dataset is not None)
    net = {"i3d": I3D, "transnetv2": TRANSNETV2, "videomae": VIDEOMAE}[config.features]
    extractor = load_extractor(net, config.weights, config.sha256, device)
    protocol = ucf101_protocol(config, name, len(dataset.clips), extractor)
    prompts = captions(dataset) if protocol.prompt == "caption" else None
    items = prompt_list(dataset.histogram, config.samples, prompts)
    batch_size = context.preset.compute.evaluation.ucf101.batch_size
    collector = Collector(context.work / protocol.digest(), protocol, extractor, batch_size)
    return Evaluation(config, context.preset.seed, dataset, name, items, protocol, extractor, collector)


def clip_seed(seed: int, number: int) -> int:
    """Return the seed of clip `number` of a run; it doesn't depend on batches or order."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:7], "big")


def real_features(evaluation: Evaluation) -> FeatureSet:
    """Return the features of all real clips; keeps the first clip of each class that is shown."""
    first: dict[str, int] = {}
    for number, (label, _) in enumerate(evaluation.dataset.clips):
        first.setdefault(label, number)
    keep = [first[evaluation.items[number].label] for number in evaluation.shown]

    def make(numbers: list[int]) -> Tensor:
        clips = [read_real(evaluation.dataset, number, evaluation.protocol) for number in numbers]
        return torch.cat([evaluation.protocol.images(clip[None], real=True) for clip in clips])

    groups = group_numbers([f"{label}/{path.stem}" for label, path in evaluation.dataset.clips])
    return evaluation.collector.collect("real", len(evaluation.dataset.clips), make, keep, groups)


def sampled_features(
    evaluation: Evaluation, models: Models, seed: int, name: str, guidance: float | None = None
) -> FeatureSet:
    """Sample one clip per prompt and return the features (App. E.4).

    name: the folder of the cache. guidance: replaces the configured guidance scale.
    """
    config = evaluation.config
    sampling = config.sampling if guidance is None else config.sampling.model_copy(update={"guidance": guidance})

    def make(numbers: list[int]) -> Tensor:
        clips = text_to_video(
            models,
            [evaluation.items[number].prompt for number in numbers],
            frames=config.frames,
            height=config.height,
            width=config.width,
            fps=config.fps,
            motion_bucket=config.motion_bucket,
            sampling=sampling,
            seed=[clip_seed(seed, number) for number in numbers],
            progress=False,
        )
        return evaluation.protocol.images(clips * 255, real=False)

    return evaluation.collector.collect(name, len(evaluation.items), make, evaluation.shown)


def noise_features(evaluation: Evaluation, seed: int) -> FeatureSet:
    """Return the features of a control: uniform noise of the model's size, through the same steps."""
    config = evaluation.config
    shape = (config.frames, 3, config.height, config.width)

    def make(numbers: list[int]) -> Tensor:
        clips = noise_clips(shape, [clip_seed(seed, number) for number in numbers])
        return evaluation.protocol.images(clips, real=False)

    return evaluation.collector.collect(f"noise-{seed}", len(evaluation.items), make)


def mean_frame_state(evaluation: Evaluation, real: FeatureSet) -> MomentState:
    """Return the moments of a control: the mean of all real frames as a still clip, once per prompt."""
    image = torch.from_numpy(real.mean_image()).float()
    clip = image.expand(1, evaluation.config.frames, *image.shape)
    return repeated(evaluation.extractor.features(evaluation.protocol, clip), len(evaluation.items))


def score_all(evaluation: Evaluation, models: Models, real: FeatureSet) -> tuple[list[Score], FeatureSet, list[str]]:
    """Score the generated clips and the controls for every seed.

    Returns the scores, the clips of the first seed, and warnings.
    """
    state, ddof = real.state(), evaluation.protocol.ddof
    scores: list[Score] = []
    warnings: list[str] = []
    first: FeatureSet | None = None

    def add(subject: str, seed: int | None, generated: MomentState) -> None:
        scores.append(Score(subject, seed, distance(state, generated, ddof)))

    for seed in range(evaluation.seed, evaluation.seed + evaluation.config.seeds):
        generated = sampled_features(evaluation, models, seed, f"generated-{seed}")
        warnings.extend(check_overlap(real.digests, generated.digests))
        add("generated", seed, generated.state())
        first = first or generated
        if "untrained" in evaluation.config.controls:
            # The last layer of a fresh network is zero for any condition: guidance would only cost time.
            random = sampled_features(evaluation, untrained(models, seed), seed, f"untrained-{seed}", guidance=1.0)
            add("untrained", seed, random.state())
        if "noise" in evaluation.config.controls:
            add("noise", seed, noise_features(evaluation, seed).state())
    if "mean-frame" in evaluation.config.controls:
        add("mean-frame", None, mean_frame_state(evaluation, real))
    scores.append(Score("real-split", None, distance(*real.halves(), ddof)))
    assert first is not None
    warnings.extend(scores[0].distance.warnings)
    return scores, first, warnings


def ucf101_metrics(result: Result) -> dict[str, float | int | str]:
    """Return flat metrics of a result.

    Means over seeds named `<dataset>_<metric>[_<control>]`, their error bars, and the numbers of clips.
    """
    net = result.metric.removeprefix("frechet_")
    metrics: dict[str, float | int | str] = {}
    for subject in dict.fromkeys(score.subject for score in result.scores):
        found = [score.distance for score in result.of(subject)]
        suffix = "" if subject == "generated" else f"_{subject.replace('-', '_')}"
        frechet = [d.frechet.value for d in found]
        metrics[f"{result.dataset}_{result.metric}{suffix}"] = float(np.mean(frechet))
        metrics[f"{result.dataset}_{result.metric}{suffix}_se"] = _mean_error([d.standard_error for d in found])
        metrics[f"{result.dataset}_kernel_{net}{suffix}"] = float(np.mean([d.kernel.unbiased for d in found]))
        if len(found) > 1:
            metrics[f"{result.dataset}_{result.metric}{suffix}_seed_sd"] = float(np.std(frechet, ddof=1))
    main = result.of("generated")[0].distance
    metrics |= {"generated_clips": main.generated, "real_clips": main.real, "seeds": len(result.of("generated"))}
    return metrics


def _mean_error(errors: list[float]) -> float:
    """Return the error of a mean over seeds.

    Seeds share the real clips, so their errors aren't independent, and aren't divided by √n.
    """
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def write_outputs(
    evaluation: Evaluation, result: Result, real: FeatureSet, generated: FeatureSet, folder: Path
) -> list[Row]:
    """Write everything but metrics.json: result.json, tables, prompts, features, moments, shown clips; return rows."""
    rows = [*result.rows(), *paper_rows()]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", result_json(result))
    write_score_rows(folder / "results.csv", rows)
    write_bytes(folder / "table.md", markdown_table(rows).encode())
    prompts = [f"{item.number},{item.label},{item.prompt}" for item in evaluation.items]
    write_bytes(folder / "prompts.csv", "\n".join(["number,class,prompt", *prompts, ""]).encode())
    label = {"weights": evaluation.extractor.weights, "protocol": evaluation.protocol.digest()}
    for name, found in (("real", real), ("generated", generated)):
        write_bytes(folder / "features" / f"{name}.safetensors", packed({"features": found.features}, label))
        if len(found.features) > found.features.shape[1]:  # else the features themselves are the smaller file
            save_state(folder / "moments" / f"{name}.safetensors", found.state(), label)
    write_shown_clips(evaluation, real, generated, folder / "samples")
    return rows


def write_shown_clips(evaluation: Evaluation, real: FeatureSet, generated: FeatureSet, folder: Path) -> None:
    """Write the shown clips as mp4, each with a real clip of its class, their list, and one image of all."""
    pairs, listed = [], []
    by_class = {evaluation.dataset.clips[number][0]: clip for number, clip in sorted(real.clips.items())}
    for number in evaluation.shown:
        item = evaluation.items[number]
        made, truth = generated.clips[number], by_class[item.label]
        names = {}
        for kind, clip in (("generated", made), ("real", truth)):
            names[kind] = f"{kind}-{number:05d}-{item.label}.mp4"
            even = clip[:, : clip.shape[1] // 2 * 2, : clip.shape[2] // 2 * 2]
            write_mp4(folder / names[kind], even, evaluation.config.fps, {"class": item.label})
        pairs.append((item.label, made, truth))
        listed.append({"class": item.label, "prompt": item.prompt, **names})
    write_bytes(folder / "samples.json", (json.dumps(listed, indent=2, sort_keys=True) + "\n").encode())
    write_png(folder / "grid.png", comparison_grid(pairs))


def run(context: StageContext) -> Report:
    """Evaluate the finetuned text-to-video model.

    Inputs: sources, encoders, autoencoder, high-quality-finetuning. Raises UserError for missing weights, data sets and
    models, and for clips that can't be scored.
    """
    device = pick_device()
    evaluation = prepare(context, device)
    unet = context.inputs["high-quality-finetuning"] / "unet"
    folders = {"unet": unet, "autoencoder": context.inputs["autoencoder"], "encoders": context.inputs["encoders"]}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; run the stage that makes the {name} first")
    models = load_models(unet, folders["autoencoder"], folders["encoders"], context.preset.encoders, device)
    real = real_features(evaluation)
    scores, generated, warnings = score_all(evaluation, models, real)
    hashes = {name: checkpoint_hash(folders[name]) for name in ("unet", "autoencoder")}
    result = Result(
        evaluation.name,
        evaluation.metric,
        evaluation.extractor.weights,
        evaluation.protocol.describe(),
        hashes,
        tuple(scores),
        tuple(dict.fromkeys(warnings)),
        sampling(evaluation.config),
        real.identity(),
    )
    finished = context.work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    write_outputs(evaluation, result, real, generated, finished)
    metrics = ucf101_metrics(result)
    log_outputs(context.tracker, finished, metrics)
    return publish(finished, context.output, Report(metrics, ucf101_summary(result)))


def log_outputs(tracker: Tracker, finished: Path, metrics: Mapping[str, float | int | str]) -> None:
    """Report scores, tables and the shown clips to the tracker."""
    tracker.log_metrics({name: float(value) for name, value in metrics.items() if not isinstance(value, str)}, 0)
    for name in ("results.csv", "table.md", "result.json"):
        tracker.log_file(finished / name, "evaluation")
    for path in sorted((finished / "samples").glob("*")):
        tracker.log_file(path, "evaluation/samples")


def ucf101_summary(result: Result) -> str:
    """Return one line: the score between its controls."""
    parts = []
    for subject in dict.fromkeys(score.subject for score in result.scores):
        values = [score.distance.frechet.value for score in result.of(subject)]
        parts.append(f"{subject} {np.mean(values):.4g}")
    clips = result.of("generated")[0].distance.generated
    return f"{result.dataset} {result.metric} ({clips} clips): {', '.join(parts)}"
