"""Stage `image-to-video-evaluation`: does the clip start with the picture, go on as the film does, move as asked?

The paper asks people which of two clips they prefer (§4.2, E.3). Here test clips of the latent cache are animated from
their first frame, with their own frame rate and motion bucket:

- the first frame against the picture (PSNR), beside the picture passed through the autoencoder;
- the frames after it against the film (as decoded), beside who repeats the first frame;
- the optical flow under rising motion buckets, all else equal.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.claims import Claim, paired_claim, write_claims
from evaluation.recognition.cached import CachedClips, psnr, read_cached
from evaluation.recognition.camera import mean_flow
from evaluation.recognition.kept import as_clips, as_frames, kept_clips
from evaluation.tables import write_csv
from svd.config import ImageToVideoEvaluation, Sampling
from svd.core.device import pick_device
from svd.core.files import write_json
from svd.generation import Models, image_to_video, load_models
from svd.latents.cache import digest
from svd.media.video import Frames, filmstrip, write_png
from svd.model.formats.folders import checkpoint_hash
from svd.stage import Report, StageContext, publish

GOAL = 22.0  # dB of the first frame: below it people see another picture
_SHOWN = 6


@dataclass(frozen=True)
class Animation:
    """All that stays the same while an evaluation runs."""

    config: ImageToVideoEvaluation
    seed: int
    models: Models
    clips: CachedClips
    protocol: str
    work: Path

    def animate(
        self, name: str, count: int, sampling: Sampling, buckets: Sequence[float], guided: bool = True
    ) -> list[Frames]:
        """Animate the first `count` pictures, each with its motion bucket; see `animated`."""
        return animated(self.work / name, self.models, self.clips, sampling, self.seed, buckets[:count], guided)


def animated(
    folder: Path,
    models: Models,
    clips: CachedClips,
    sampling: Sampling,
    seed: int,
    buckets: Sequence[float],
    guided: bool = True,
) -> list[Frames]:
    """Animate the first pictures, one for each of `buckets`, their motion buckets; clips (T, H, W, 3) uint8.

    Finished ones are kept in `folder`. guided: guidance rises from 1 over the frames to that of `sampling` (D.4.1).
    """

    def make(numbers: Sequence[int]) -> Tensor:
        return image_to_video(
            models,
            clips.pictures[list(numbers)],
            frames=clips.truth.shape[1],
            height=clips.size[0],
            width=clips.size[1],
            fps=[clips.fps[number] for number in numbers],
            motion_bucket=[buckets[number] for number in numbers],
            sampling=sampling,
            seed=[clip_seed(seed, clips.ids[number]) for number in numbers],
            guidance_range=(1.0, max(1.0, sampling.guidance) if guided else 1.0),
            progress=False,
        )

    return kept_clips(folder, len(buckets), make)


def clip_seed(seed: int, sample: str) -> int:
    """Return the seed of a sample's clip."""
    return int.from_bytes(hashlib.sha256(f"image-to-video:{seed}:{sample}".encode()).digest()[:7], "big")


def run(context: StageContext) -> Report:
    """Evaluate the image-to-video model. Inputs: latents, autoencoder, encoders, image-to-video.

    Raises UserError for missing models and for a cache without test clips.
    """
    animation = prepare(context)
    config, clips = animation.config, animation.clips
    made = animation.animate("generated", len(clips), config.sampling, clips.motion_buckets)
    single = config.sampling.model_copy(update={"steps": 1})
    # The denoised clip at the highest noise level: close to the mean of all clips that begin with the picture.
    mean = animation.animate("one step", len(clips), single, clips.motion_buckets, guided=False)
    flows = measured_flows(animation)
    restored = reconstructed(animation.models, clips.pictures)
    claims = claims_of(animation, as_clips(made), as_clips(mean), flows)
    metrics = metrics_of(animation, as_clips(made), as_clips(mean), restored, flows)
    finished = context.work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir(parents=True)
    write_claims(finished, claims)
    write_csv(finished / "motion.csv", _flow_rows(animation, flows))
    write_json(finished / "protocol.json", _about(context, animation))
    truth = as_frames(clips.truth)
    strips = [filmstrip(frames[i], 8) for i in range(min(_SHOWN, len(clips))) for frames in (made, truth)]
    write_png(finished / "samples" / "sheet.png", np.concatenate(strips))
    context.tracker.log_metrics({k: float(v) for k, v in metrics.items() if not isinstance(v, str)}, 0)
    summary = "first frame {psnr_first:.1f} dB, later frames {psnr_later:.1f} dB (repeated first {psnr_repeated:.1f})"
    return publish(finished, context.output, Report(metrics, summary.format(**metrics)))


def prepare(context: StageContext) -> Animation:
    """Load the networks and read the test clips, with the frames and the size of the last training phase."""
    inputs, config = context.inputs, context.preset.evaluation.image_to_video
    networks = (inputs["autoencoder"], inputs["encoders"], context.preset.encoders, pick_device())
    models = load_models(inputs["image-to-video"] / "unet", *networks)
    phase = context.preset.image_to_video.phases[-1]
    clips = read_cached(inputs, models, phase, config.clips)
    protocol = digest("image-to-video", config.model_dump(mode="json"), clips.ids)
    return Animation(config, context.preset.seed, models, clips, protocol, context.work / "clips" / protocol)


@torch.no_grad()
def reconstructed(models: Models, pictures: Tensor) -> Tensor:
    """Return pictures (N, 3, H, W) in [0, 1] passed through the autoencoder."""
    latents = models.encode_frames(pictures[:, None] * 2 - 1) * models.autoencoder.config.scaling_factor
    return models.decode(latents, progress=False)[:, 0]


def measured_flows(animation: Animation) -> np.ndarray:
    """Return the mean optical flow, frame widths per second, of each clip under each bucket, (clips, buckets)."""
    count, buckets = min(animation.config.motion_clips, len(animation.clips)), animation.config.buckets
    found = []
    for bucket in buckets:
        made = animation.animate(f"bucket {bucket}", count, animation.config.sampling, [float(bucket)] * count)
        found.append([mean_flow(clip, fps) for clip, fps in zip(made, animation.clips.fps, strict=False)])
    return np.array(found).T


def rank_correlation(values: Sequence[float]) -> float:
    """Return Spearman's rank correlation of a sequence with its order: 1 when it only rises, 0 when all are equal.

    Equal values share the mean of their ranks. 0 when one of them is no number.
    """
    found = np.asarray(values)
    if np.isnan(found).any():
        return 0.0
    ranks = [float((found < value).sum() + ((found == value).sum() - 1) / 2) for value in found]
    spread = float(np.std(ranks) * np.std(np.arange(len(ranks))))
    order = np.arange(len(ranks)) - (len(ranks) - 1) / 2
    return float(np.mean(order * ranks)) / spread if spread > 0 else 0.0


def motion_claim(flows: np.ndarray, protocol: str) -> Claim:
    """Claim that a higher bucket gives more flow: the mean rank correlation over clips against none.

    Without a relation the correlation of n buckets has the variance 1 / (n - 1) in each clip.
    """
    clips, buckets = flows.shape
    value = float(np.mean([rank_correlation(row) for row in flows]))
    text = f"a higher motion bucket gives more optical flow ({buckets} buckets, all else equal)"
    return Claim(
        text,
        value,
        "no relation",
        0.0,
        value * math.sqrt((buckets - 1) * clips),
        clips,
        "rank correlation",
        protocol=protocol,
    )


def claims_of(animation: Animation, made: Tensor, mean: Tensor, flows: np.ndarray) -> list[Claim]:
    """Return the claims about clips `made`, and their one-step estimates `mean`, both (N, T, 3, H, W) in [0, 1]."""
    pictures, truth, protocol = animation.clips.pictures, animation.clips.truth, animation.protocol
    first = psnr(made[:, 0], pictures)
    average = psnr(pictures.mean(0).expand_as(pictures), pictures)
    repeated = psnr(truth[:, :1].expand_as(truth[:, 1:]), truth[:, 1:])
    goal = [GOAL] * len(first)
    after, mean_after = psnr(made[:, 1:], truth[:, 1:]), psnr(mean[:, 1:], truth[:, 1:])
    start, later, still = "the first frame is the picture", "later frames follow the film", "the first frame repeated"
    return [
        paired_claim(start, first, "the mean picture", average, "dB", protocol=protocol),
        paired_claim(f"{start}, at {GOAL:g} dB and more", first, "goal", goal, "dB", protocol=protocol),
        paired_claim(later, after, still, repeated, "dB", protocol=protocol),
        paired_claim(f"{later}, as one-step estimates", mean_after, still, repeated, "dB", protocol=protocol),
        motion_claim(flows, protocol),
    ]


def metrics_of(
    animation: Animation, made: Tensor, mean: Tensor, restored: Tensor, flows: np.ndarray
) -> dict[str, float | int | str]:
    """Return flat metrics: PSNR of first and later frames in dB, and the flow under each bucket."""
    pictures, truth = animation.clips.pictures, animation.clips.truth
    first, still = truth[:, :1], truth[:, 1:]
    values: dict[str, float] = {
        "psnr_first": float(np.mean(psnr(made[:, 0], pictures))),
        "psnr_first_autoencoder": float(np.mean(psnr(restored, pictures))),
        "psnr_later": float(np.mean(psnr(made[:, 1:], still))),
        "psnr_later_one_step": float(np.mean(psnr(mean[:, 1:], still))),
        "psnr_repeated": float(np.mean(psnr(first.expand_as(still), still))),
        "motion_rank_correlation": float(np.mean([rank_correlation(row) for row in flows])),
    }
    values |= {f"flow_bucket_{b}": float(v) for b, v in zip(animation.config.buckets, flows.mean(0), strict=True)}
    rising = bool((np.diff(flows.mean(0)) > 0).all())
    rounded = {name: round(value, 6) for name, value in values.items()}
    return {"clips": len(made), "flow_rises": int(rising), "protocol": animation.protocol, **rounded}


def _flow_rows(animation: Animation, flows: np.ndarray) -> list[dict[str, object]]:
    return [
        {"sample": animation.clips.ids[number], "bucket": bucket, "flow": float(flows[number, k])}
        for number in range(len(flows))
        for k, bucket in enumerate(animation.config.buckets)
    ]


def _about(context: StageContext, animation: Animation) -> dict[str, object]:
    folders = {name: context.inputs[name] for name in ("image-to-video", "autoencoder")}
    folders["image-to-video"] /= "unet"
    return {
        "protocol": animation.config.model_dump(mode="json"),
        "digest": animation.protocol,
        "models": {name: checkpoint_hash(folder) for name, folder in folders.items()},
    }
