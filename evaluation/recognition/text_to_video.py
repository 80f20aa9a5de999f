"""Stage `recognition-evaluation`: is what the prompt says in the clip? (§4.1; the paper asks people.)

Prompts are the true captions of test scenes of the synthetic worlds, so colour, shape, object motion and camera motion
of each are known. A classifier trained on real clips of the training worlds names the first three in generated clips,
curation's camera classifier the fourth. The same judges look at controls: the real clips of the prompts, those clips
passed through the autoencoder, the network of the stage before, an untrained one, the mean frame, and noise.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.claims import Claim, paired_claim, share_claim, wilson, write_claims
from evaluation.recognition.camera import camera_motion
from evaluation.recognition.classifier import ClipClassifier, train_classifier
from evaluation.recognition.kept import as_clips, as_frames, kept_clips
from evaluation.recognition.labels import ATTRIBUTES, ClipShape, LabelledClip, has_labels, read_labelled
from evaluation.tables import write_csv
from evaluation.untrained import untrained
from svd.config import RecognitionConfig
from svd.core.device import pick_device
from svd.core.files import write_json
from svd.generation import Models, load_models, text_to_video
from svd.latents.cache import digest
from svd.media.video import Frames, filmstrip, write_png
from svd.model.formats.folders import checkpoint_hash, load_unet
from svd.stage import Report, StageContext, publish

Answers = Mapping[str, Sequence[str]]  # attribute: what is seen in each clip
_SHOWN = 6
_NAMES = {"colour": "colour", "shape": "shape", "action": "object motion", "camera": "camera motion"}


@dataclass(frozen=True)
class Recognition:
    """All that stays the same while an evaluation runs.

    shape: of all clips. prompts: the test scenes whose captions are the prompts.
    """

    config: RecognitionConfig
    shape: ClipShape
    seed: int
    prompts: Sequence[LabelledClip]
    classifier: ClipClassifier
    protocol: str
    work: Path

    def truth(self, attribute: str) -> list[str]:
        """Return the label of each prompt."""
        return [clip.labels[attribute] for clip in self.prompts]

    def chance(self, attribute: str) -> float:
        """Return the share of right answers of who always gives the prompts' most frequent label."""
        return Counter(self.truth(attribute)).most_common(1)[0][1] / len(self.prompts)

    def answers(self, clips: Sequence[Frames]) -> Answers:
        """Return what the judges see in clips."""
        cameras = [camera_motion(clip, self.config.fps).label for clip in clips]
        return {**self.classifier.answers(clips), "camera": cameras}

    def right(self, answers: Answers, attribute: str) -> list[bool]:
        """Return for each clip whether the prompt's label was seen."""
        return [a == b for a, b in zip(answers[attribute], self.truth(attribute), strict=True)]


def run(context: StageContext) -> Report:
    """Judge the clips of the text-to-video model; without synthetic worlds there is nothing whose truth is known.

    Inputs: sources, autoencoder, encoders, video-pretraining, high-quality-finetuning. Raises UserError for missing
    models and for worlds without a scene of the clips' length.
    """
    finished = context.work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir(parents=True)
    if not has_labels(context.inputs["sources"]):
        return publish(finished, context.output, Report({"prompts": 0}, "no synthetic worlds: nothing to recognise"))
    recognition = prepare(context)
    seen = {name: make() for name, make in subjects(context, recognition).items()}
    answers = {name: recognition.answers(clips) for name, clips in seen.items()}
    claims = claims_of(recognition, answers)
    write_claims(finished, claims)
    write_csv(finished / "recognition.csv", _rows(recognition, answers))
    write_csv(finished / "by_clip.csv", _by_clip(recognition, answers))
    write_json(finished / "protocol.json", _about(context, recognition))
    strips = [filmstrip(clips[i], 8) for i in range(min(_SHOWN, len(recognition.prompts))) for clips in _pair(seen)]
    write_png(finished / "samples" / "sheet.png", np.concatenate(strips))
    metrics = metrics_of(recognition, answers)
    context.tracker.log_metrics({k: float(v) for k, v in metrics.items() if not isinstance(v, str)}, 0)
    return publish(finished, context.output, Report(metrics, _summary(claims, len(recognition.prompts))))


def _pair(seen: Mapping[str, list[Frames]]) -> tuple[list[Frames], list[Frames]]:
    return seen["generated"], seen["real"]


def prepare(context: StageContext) -> Recognition:
    """Train the judge on real clips, and choose the prompts."""
    config, sources = context.preset.evaluation.recognition, context.inputs["sources"]
    phase = context.preset.high_quality_finetuning.phases[-1]
    shape = ClipShape(phase.frames, config.fps, phase.height, phase.width)
    classifier = train_classifier(
        read_labelled(sources, "train", config.training_clips, shape), config.training_steps, context.preset.seed
    )
    prompts = read_labelled(sources, "test", config.prompts, shape)
    captions = [clip.caption for clip in prompts]
    protocol = digest("recognition", config.model_dump(mode="json"), asdict(shape), classifier.classes, captions)
    work = context.work / "clips" / protocol
    return Recognition(config, shape, context.preset.seed, prompts, classifier, protocol, work)


def subjects(context: StageContext, recognition: Recognition) -> dict[str, Callable[[], list[Frames]]]:
    """Return for each subject what makes its clips, (T, H, W, 3) uint8, one per prompt."""
    inputs, count = context.inputs, len(recognition.prompts)
    networks = (inputs["autoencoder"], inputs["encoders"], context.preset.encoders, pick_device())
    models = load_models(inputs["high-quality-finetuning"] / "unet", *networks)
    earlier = load_unet(inputs["video-pretraining"] / "unet", device=models.device, dtype=models.dtype)
    before = replace(models, unet=earlier.eval().requires_grad_(False))
    real = [clip.frames for clip in recognition.prompts]
    guidance = recognition.config.sampling.guidance
    return {
        "generated": lambda: _generated(recognition, "generated", models, guidance),
        "video pretraining": lambda: _generated(recognition, "video pretraining", before, guidance),
        # The last layer of a fresh network is zero for any condition: guidance would only cost time.
        "untrained": lambda: _generated(recognition, "untrained", untrained(models, recognition.seed), 1.0),
        "noise": lambda: list(_noise(recognition.seed, np.stack(real).shape)),
        "mean frame": lambda: [np.stack([np.mean(real, axis=(0, 1)).round().astype(np.uint8)] * len(real[0]))] * count,
        "autoencoder": lambda: [_reconstructed(models, clip) for clip in real],
        "real": lambda: real,
    }


def clip_seed(seed: int, number: int) -> int:
    """Return the seed of clip `number`, the same for all networks; it doesn't depend on batches or order."""
    return int.from_bytes(hashlib.sha256(f"recognition:{seed}:{number}".encode()).digest()[:7], "big")


def _generated(recognition: Recognition, name: str, models: Models, guidance: float) -> list[Frames]:
    config, prompts = recognition.config, recognition.prompts

    def make(numbers: Sequence[int]) -> Tensor:
        return text_to_video(
            models,
            [prompts[number].caption for number in numbers],
            frames=recognition.shape.frames,
            height=recognition.shape.height,
            width=recognition.shape.width,
            fps=config.fps,
            motion_bucket=config.motion_bucket,
            sampling=config.sampling.model_copy(update={"guidance": guidance}),
            seed=[clip_seed(recognition.seed, number) for number in numbers],
            progress=False,
        )

    return kept_clips(recognition.work / name, len(prompts), make)


def _noise(seed: int, shape: tuple[int, ...]) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@torch.no_grad()
def _reconstructed(models: Models, clip: Frames) -> Frames:
    latents = models.encode_frames(as_clips([clip]) * 2 - 1) * models.autoencoder.config.scaling_factor
    return as_frames(models.decode(latents, progress=False))[0]


def claims_of(recognition: Recognition, answers: Mapping[str, Answers]) -> list[Claim]:
    """Return the claims: each attribute against chance, and all of them against the stage before."""
    protocol, made = recognition.protocol, answers["generated"]
    claims = [
        share_claim(
            f"the prompt's {_NAMES[attribute]} is recognised in generated clips",
            recognition.right(made, attribute),
            "the most frequent answer",
            recognition.chance(attribute),
            protocol,
        )
        for attribute in ATTRIBUTES
    ]
    for other, text in (
        ("untrained", "clips follow their prompts"),
        ("video pretraining", "high-quality finetuning follows prompts better than the stage before"),
    ):
        own, theirs = (
            [float(np.mean(hits)) for hits in zip(*(recognition.right(answers[s], a) for a in ATTRIBUTES), strict=True)]
            for s in ("generated", other)
        )  # per clip: the answers about one clip aren't independent
        claims.append(paired_claim(f"{text}, of four attributes", own, other, theirs, "share", protocol=protocol))
    return claims


def metrics_of(recognition: Recognition, answers: Mapping[str, Answers]) -> dict[str, float | int | str]:
    """Return flat metrics: `<attribute>_<subject>`, the shares of clips in which the prompt's label is seen."""
    metrics: dict[str, float | int | str] = {"prompts": len(recognition.prompts), "protocol": recognition.protocol}
    for attribute in ATTRIBUTES:
        metrics[f"{attribute}_chance"] = recognition.chance(attribute)
        for subject, seen in answers.items():
            share = float(np.mean(recognition.right(seen, attribute)))
            metrics[f"{attribute}_{subject.replace(' ', '_')}"] = round(share, 6)
    return metrics


def _rows(recognition: Recognition, answers: Mapping[str, Answers]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for subject, seen in answers.items():
        for attribute in ATTRIBUTES:
            right = recognition.right(seen, attribute)
            low, high = wilson(sum(right), len(right))
            shares = {
                "share": sum(right) / len(right),
                "low": low,
                "high": high,
                "chance": recognition.chance(attribute),
            }
            about = {"subject": subject, "attribute": attribute, "right": sum(right), "clips": len(right)}
            rows.append({**about, **shares, "protocol": recognition.protocol})
    return rows


def _by_clip(recognition: Recognition, answers: Mapping[str, Answers]) -> list[dict[str, str]]:
    return [
        {"subject": subject, "caption": clip.caption}
        | {name: clip.labels[name] for name in ATTRIBUTES}
        | {f"seen_{name}": seen[name][number] for name in ATTRIBUTES}
        for subject, seen in answers.items()
        for number, clip in enumerate(recognition.prompts)
    ]


def _about(context: StageContext, recognition: Recognition) -> dict[str, object]:
    names = ("high-quality-finetuning", "video-pretraining")
    hashes = {name: checkpoint_hash(context.inputs[name] / "unet") for name in names}
    hashes["autoencoder"] = checkpoint_hash(context.inputs["autoencoder"])
    return {
        "protocol": recognition.config.model_dump(mode="json") | asdict(recognition.shape),
        "digest": recognition.protocol,
        "classes": recognition.classifier.classes,
        "models": hashes,
    }


def _summary(claims: Sequence[Claim], prompts: int) -> str:
    pairs = zip(ATTRIBUTES, claims, strict=False)  # these come first
    parts = [f"{name} {claim.value:.2f} (chance {claim.control_value:.2f})" for name, claim in pairs]
    return f"seen in clips of {prompts} prompts: {', '.join(parts)}"
