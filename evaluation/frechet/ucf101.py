"""Stage `ucf101-evaluation`: zero-shot Fréchet distance on UCF-101 (App. E.4), with controls and error bars.

One clip a prompt of the official list is sampled, brought to the paper's size, and compared with the real clips
through
the features of a fixed network. The same run scores noise, the mean frame and an untrained network of the same
shape, and
real clips against real clips: a score means something only between these.
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

from evaluation.frechet.batches import Collector, FeatureSet, noise_pictures, repeated
from evaluation.frechet.distances import distance
from evaluation.frechet.features import Extractor, check_overlap, load_extractor, metric_name
from evaluation.frechet.moments import MomentState, packed, save_state
from evaluation.frechet.pictures import comparison_grid
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
from evaluation.tables import Row, markdown_table, write_rows
from svd.config import Ucf101Config
from svd.core.errors import UserError
from svd.core.files import write_json
from svd.media.video import write_mp4, write_png
from svd.model.formats.folders import checkpoint_hash
from svd.model.unet import UNet
from svd.stage import Report, StageContext, Tracker, publish
from svd.storage import write_bytes
from svd.tasks.api import Models, load_models, text_to_video

FIXTURE = "ucf101_fixture"


@dataclass(frozen=True)
class Evaluation:
    """Everything that stays the same while an evaluation runs."""

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
        """`fvd` or `frechet_<network>`."""
        return metric_name(self.extractor.net, self.extractor.sha256)

    @property
    def shown(self) -> list[int]:
        """Numbers of the items that are shown."""
        return spread([item.number for item in self.items], self.config.shown)


def make_protocol(config: Ucf101Config, dataset: str, real: int, extractor: Extractor) -> EvalProtocol:
    """The protocol that a configuration means: the paper's, its name followed by what the configuration changes.

    real: number of real clips.
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
    """How clips are sampled: what besides the weights decides about a generated clip, and no protocol says."""
    size = {name: getattr(config, name) for name in ("height", "width", "frames", "fps", "motion_bucket")}
    return {**size, **config.sampling.model_dump()}


def prepare(context: StageContext, device: str = "cpu") -> Evaluation:
    """Read the real clips' list, load the feature network, fix the protocol. Raises UserError for what is missing."""
    config = context.preset.evaluation.ucf101
    name = FIXTURE if config.dataset is None else "ucf101"
    folder = context.inputs["sources"] / FIXTURE if config.dataset is None else Path(config.dataset).expanduser()
    dataset = read_dataset(folder, official=config.dataset is not None)
    net = {"i3d": I3D, "transnetv2": TRANSNETV2, "videomae": VIDEOMAE}[config.features]
    extractor = load_extractor(net, config.weights, config.sha256, device)
    protocol = make_protocol(config, name, len(dataset.clips), extractor)
    prompts = captions(dataset) if protocol.prompt == "caption" else None
    items = prompt_list(dataset.histogram, config.samples, prompts)
    batch_size = context.preset.compute.evaluation.ucf101.batch_size
    collector = Collector(context.work / protocol.digest(), protocol, extractor, batch_size)
    return Evaluation(config, context.preset.seed, dataset, name, items, protocol, extractor, collector)


def clip_seed(seed: int, number: int) -> int:
    """Seed of clip `number` of a run: independent of batch size and order."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:7], "big")


def real_features(evaluation: Evaluation) -> FeatureSet:
    """Features of all real clips; keeps the first clip of each class that is shown."""
    first: dict[str, int] = {}
    for number, (label, _) in enumerate(evaluation.dataset.clips):
        first.setdefault(label, number)
    keep = [first[evaluation.items[number].label] for number in evaluation.shown]

    def make(numbers: list[int]) -> Tensor:
        clips = [read_real(evaluation.dataset, number, evaluation.protocol) for number in numbers]
        return torch.cat([evaluation.protocol.pictures(clip[None], real=True) for clip in clips])

    groups = group_numbers([f"{label}/{path.stem}" for label, path in evaluation.dataset.clips])
    return evaluation.collector.collect("real", len(evaluation.dataset.clips), make, keep, groups)


def sampled_features(
    evaluation: Evaluation, models: Models, seed: int, name: str, guidance: float | None = None
) -> FeatureSet:
    """Features of one sampled clip a prompt (App. E.4); `name` is the cache's folder, `guidance` replaces the
    configured one.
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
        return evaluation.protocol.pictures(clips * 255, real=False)

    return evaluation.collector.collect(name, len(evaluation.items), make, evaluation.shown)


def noise_features(evaluation: Evaluation, seed: int) -> FeatureSet:
    """Control: uniform noise of the model's size, through the same steps."""
    config = evaluation.config
    shape = (config.frames, 3, config.height, config.width)

    def make(numbers: list[int]) -> Tensor:
        clips = noise_pictures(shape, [clip_seed(seed, number) for number in numbers])
        return evaluation.protocol.pictures(clips, real=False)

    return evaluation.collector.collect(f"noise-{seed}", len(evaluation.items), make)


def mean_frame_state(evaluation: Evaluation, real: FeatureSet) -> MomentState:
    """Control: the mean of all real frames as a still clip, once for every prompt."""
    picture = torch.from_numpy(real.mean_picture()).float()
    clip = picture.expand(1, evaluation.config.frames, *picture.shape)
    return repeated(evaluation.extractor.features(evaluation.protocol, clip), len(evaluation.items))


def untrained(models: Models, seed: int) -> Models:
    """Control: the same models with a U-Net of the same shape and random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(models.unet.config)
    return replace(models, unet=unet.to(models.device, models.dtype).eval())


def score_all(evaluation: Evaluation, models: Models, real: FeatureSet) -> tuple[list[Score], FeatureSet, list[str]]:
    """Scores of the generated clips and of the controls for every seed; the first seed's clips; warnings."""
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
            # A fresh network's last layer is zero whatever its condition: guidance would change nothing but the time.
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


def metrics_of(result: Result) -> dict[str, float | int | str]:
    """Flat metrics: means over seeds, `<dataset>_<metric>[_<control>]`, error bars, and the numbers of clips."""
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
    """Error of a mean over seeds. Seeds share the real clips, so their errors aren't independent: no division by
    √n."""
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def write_outputs(
    evaluation: Evaluation, result: Result, real: FeatureSet, generated: FeatureSet, folder: Path
) -> list[Row]:
    """Everything but metrics.json: result.json, results.csv, table.md, prompts, features, samples, the picture."""
    rows = [*result.rows(), *paper_rows()]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", result_json(result))
    write_rows(folder / "results.csv", rows)
    write_bytes(folder / "table.md", markdown_table(rows).encode())
    prompts = [f"{item.number},{item.label},{item.prompt}" for item in evaluation.items]
    write_bytes(folder / "prompts.csv", "\n".join(["number,class,prompt", *prompts, ""]).encode())
    label = {"weights": evaluation.extractor.weights, "protocol": evaluation.protocol.digest()}
    for name, found in (("real", real), ("generated", generated)):
        write_bytes(folder / "features" / f"{name}.safetensors", packed({"features": found.features}, label))
        if len(found.features) > found.features.shape[1]:  # else the features themselves are smaller
            save_state(folder / "moments" / f"{name}.safetensors", found.state(), label)
    write_samples(evaluation, real, generated, folder / "samples")
    return rows


def write_samples(evaluation: Evaluation, real: FeatureSet, generated: FeatureSet, folder: Path) -> None:
    """The shown clips as mp4 beside a real clip of their class, their list, and one picture of all."""
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
    """Evaluate the finetuned text-to-video model; reads `sources`, `encoders`, `autoencoder`,
    `high-quality-finetuning`.

    Raises UserError for missing weights, data sets and models, and for clips that can't be scored.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
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
    metrics = metrics_of(result)
    track(context.tracker, finished, metrics)
    return publish(finished, context.output, Report(metrics, summary(result)))


def track(tracker: Tracker, finished: Path, metrics: Mapping[str, float | int | str]) -> None:
    """Report scores, tables, the picture and the sampled clips."""
    tracker.log_metrics({name: float(value) for name, value in metrics.items() if not isinstance(value, str)}, 0)
    for name in ("results.csv", "table.md", "result.json"):
        tracker.log_file(finished / name, "evaluation")
    for path in sorted((finished / "samples").glob("*")):
        tracker.log_file(path, "evaluation/samples")


def summary(result: Result) -> str:
    """One line: the score between its controls."""
    parts = []
    for subject in dict.fromkeys(score.subject for score in result.scores):
        values = [score.distance.frechet.value for score in result.of(subject)]
        parts.append(f"{subject} {np.mean(values):.4g}")
    clips = result.of("generated")[0].distance.generated
    return f"{result.dataset} {result.metric} ({clips} clips): {', '.join(parts)}"
