"""Stage `branch-evaluation`: camera LoRAs and frame interpolation, on test clips of the latent cache (§4.3.1, §4.4).

Each LoRA animates the same pictures from the same noise as the model without it; curation's camera classifier says how
often the trained motion is seen. Interpolation makes the middle frames of test clips between their ends, beside the
linear blend of the ends. The paper shows examples of both and no figures.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.claims import Claim, paired_claim, paired_shares_claim, write_claims
from evaluation.recognition.cached import CachedClips, psnr, read_cached
from evaluation.recognition.camera import camera_motion
from evaluation.recognition.image_to_video import animated
from evaluation.recognition.kept import as_clips, as_frames, kept_clips
from evaluation.tables import write_csv
from svd.config import BranchEvaluation, Sampling
from svd.core.device import pick_device
from svd.core.files import write_json
from svd.generation import Models, interpolate, load_models
from svd.latents.cache import digest
from svd.media.video import Frames, filmstrip, write_png
from svd.model.formats.folders import checkpoint_hash
from svd.model.lora import load_lora
from svd.stage import Report, StageContext, publish
from svd.tasks.camera_motions import CAMERAS
from svd.tasks.interpolation import RATE, WINDOW

_SHOWN = 4
BASE = "without"  # the image-to-video model itself


def run(context: StageContext) -> Report:
    """Evaluate the branches. Inputs: latents, autoencoder, encoders, image-to-video, camera-lora, frame-interpolation.

    Raises UserError for missing models and for a cache without test clips.
    """
    finished = context.work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    (finished / "samples").mkdir(parents=True)
    config = context.preset.evaluation.branches
    claims, metrics = _loras(context, config, finished)
    more, others = _interpolation(context, config, finished)
    write_claims(finished, [*claims, *more])
    metrics |= others
    context.tracker.log_metrics({k: float(v) for k, v in metrics.items() if not isinstance(v, str)}, 0)
    parts = [
        f"{claim.text}: {claim.value:.3g} ({claim.control} {claim.control_value:.3g})" for claim in [*claims, *more]
    ]
    return publish(finished, context.output, Report(metrics, "; ".join(parts)))


def _models(context: StageContext, stage: str) -> Models:
    inputs = context.inputs
    networks = (inputs["autoencoder"], inputs["encoders"], context.preset.encoders, pick_device())
    return load_models(inputs[stage] / "unet", *networks)


def _loras(
    context: StageContext, config: BranchEvaluation, finished: Path
) -> tuple[list[Claim], dict[str, float | int | str]]:
    """Animate the same pictures with each LoRA and without, and name the camera motion of every clip."""
    motions = list(context.preset.camera_lora.motions)
    models = _models(context, "image-to-video")
    clips = read_cached(context.inputs, models, context.preset.camera_lora.phases[-1], config.lora_clips)
    protocol = digest("camera-lora", config.model_dump(mode="json"), motions, clips.ids)
    work, sampling, seed = context.work / "clips" / protocol, config.lora_sampling, context.preset.seed
    made = {BASE: animated(work / BASE, models, clips, sampling, seed, clips.motion_buckets)}
    for motion in motions:
        adapted = _models(context, "image-to-video")
        load_lora(adapted.unet, context.inputs["camera-lora"] / motion, motion)
        made[motion] = animated(work / motion, adapted, clips, sampling, seed, clips.motion_buckets)
    seen = {name: cameras_of(films, clips.fps) for name, films in made.items()}
    claims = [lora_claim(motion, seen[motion], seen[BASE], protocol) for motion in motions]
    write_csv(finished / "cameras.csv", [{"sample": s, **_at(seen, i)} for i, s in enumerate(clips.ids)])
    strips = [filmstrip(films[i], 8) for i in range(min(_SHOWN, len(clips))) for films in made.values()]
    write_png(finished / "samples" / "loras.png", np.concatenate(strips))
    real = list(zip(cameras_of(as_frames(clips.truth), clips.fps), clips.cameras, strict=True))
    metrics: dict[str, float | int | str] = {"lora_clips": len(clips), "lora_protocol": protocol}
    metrics["camera_agreement_real"] = round(sum(a == b for a, b in real) / len(real), 6)
    for claim, motion in zip(claims, motions, strict=True):
        metrics |= {f"camera_{motion}": claim.value, f"camera_{motion}_{BASE}": claim.control_value}
    _write_about(finished / "lora-protocol.json", context, protocol, ("image-to-video",))
    return claims, metrics


def _at(seen: Mapping[str, Sequence[str]], number: int) -> dict[str, str]:
    return {name: labels[number] for name, labels in seen.items()}


def cameras_of(films: Sequence[Frames], fps: Sequence[float]) -> list[str]:
    """Return the camera label of each clip."""
    return [camera_motion(film, rate).label for film, rate in zip(films, fps, strict=True)]


def lora_claim(motion: str, seen: Sequence[str], without: Sequence[str], protocol: str) -> Claim:
    """Claim that a LoRA's motion is seen more often with it than without, on the same pictures and noise."""
    own, base = ([label in CAMERAS[motion] for label in labels] for labels in (seen, without))
    return paired_shares_claim(f"the LoRA '{motion}' moves the camera so", own, "without the LoRA", base, protocol)


def _interpolation(
    context: StageContext, config: BranchEvaluation, finished: Path
) -> tuple[list[Claim], dict[str, float | int | str]]:
    """Make the middle frames of test clips anew, and compare them with the true ones."""
    models = _models(context, "frame-interpolation")
    phase = context.preset.frame_interpolation.phases[-1].model_copy(update={"frames": WINDOW})
    clips = read_cached(context.inputs, models, phase, config.interpolation_clips)
    protocol = digest("interpolation", config.model_dump(mode="json"), clips.ids)
    sampling = config.interpolation_sampling
    one_step = sampling.model_copy(update={"steps": 1, "guidance": 1.0})
    folder, seed = context.work / "clips" / protocol, context.preset.seed
    made = interpolated(folder / "interpolated", models, clips, sampling, seed)
    mean = interpolated(folder / "one step", models, clips, one_step, seed)
    truth, blend = clips.truth[:, 1:-1], blended(clips.truth)
    scores = {name: psnr(films[:, 1:-1], truth) for name, films in (("made", made), ("mean", mean), ("blend", blend))}
    text, control = "interpolated frames are nearer to the film", "the ends blended"
    claims = [
        paired_claim(text, scores["made"], control, scores["blend"], "dB", protocol=protocol),
        paired_claim(
            f"{text}, as one-step estimates", scores["mean"], control, scores["blend"], "dB", protocol=protocol
        ),
    ]
    films = (as_frames(made), as_frames(blend), as_frames(clips.truth))
    strips = [filmstrip(kind[i], WINDOW) for i in range(min(_SHOWN, len(clips))) for kind in films]
    write_png(finished / "samples" / "interpolation.png", np.concatenate(strips))
    _write_about(finished / "interpolation-protocol.json", context, protocol, ("frame-interpolation",))
    names = {"made": "interpolation_psnr", "mean": "interpolation_psnr_one_step", "blend": "interpolation_psnr_blend"}
    values: dict[str, float | int | str] = {names[k]: round(float(np.mean(v)), 6) for k, v in scores.items()}
    return claims, {"interpolation_clips": len(clips), "interpolation_protocol": protocol, **values}


def interpolated(folder: Path, models: Models, clips: CachedClips, sampling: Sampling, seed: int) -> Tensor:
    """Return clips (N, 5, 3, H, W) in [0, 1] made from the ends of clips of five frames."""

    def make(numbers: Sequence[int]) -> Tensor:
        films = [
            interpolate(
                models,
                clips.truth[number, [0, -1]],
                fps=clips.fps[number] / RATE,
                motion_bucket=clips.motion_buckets[number],
                sampling=sampling,
                seed=seed + number,
                progress=False,
            )
            for number in numbers
        ]
        return torch.stack(films)

    return as_clips(kept_clips(folder, len(clips), make))


def blended(clips: Tensor) -> Tensor:
    """Return clips (N, T, 3, H, W) whose frames fade linearly from the first frame of `clips` to the last."""
    share = torch.linspace(0, 1, clips.shape[1])[:, None, None, None]
    return clips[:, :1] * (1 - share) + clips[:, -1:] * share


def _write_about(path: Path, context: StageContext, protocol: str, stages: Sequence[str]) -> None:
    models = {stage: checkpoint_hash(context.inputs[stage] / "unet") for stage in stages}
    options = context.preset.evaluation.branches.model_dump(mode="json")
    write_json(path, {"protocol": options, "digest": protocol, "models": models})
