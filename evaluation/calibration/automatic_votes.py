"""Automatic votes of the threshold calibration, for tests and for presets that nobody looks at.

They stand in for human votes and are never taken for them: every row says `automatic`. For prompt following, the clip
wins whose frames have the higher mean CLIP similarity with the prompt. For visual quality, the clip wins whose
TransNetV2 features are nearer to those of real test clips (mean Euclidean distance to the 3 nearest, features scaled by
their spread over the real clips). Neither rule has been compared with people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.frechet.features import Extractor, load_extractor
from evaluation.frechet.protocol import TRANSNETV2, EvalProtocol
from evaluation.preference.pairs import schedule
from evaluation.preference.ratings import Vote
from svd.config import Phase
from svd.core.errors import UserError
from svd.latents.cache import LatentCache
from svd.media.video import read_frames
from svd.model.autoencoder import Autoencoder, posterior_mean
from svd.model.encoders import Encoders, from_uint8

RATER = "automatic"
NEAREST = 3
Scores = Mapping[tuple[str, str], float]


def nearness(features: NDArray[np.float64], real: NDArray[np.float64], nearest: int = NEAREST) -> NDArray[np.float64]:
    """Return minus the mean distance (N,) of features (N, d) to the `nearest` real ones of (M, d); higher is closer.

    Each dimension is divided by its standard deviation over the real clips; constant ones count as they are.
    """
    spread = real.std(axis=0)
    scale = np.where(spread > 1e-6, spread, 1.0)
    distances = np.linalg.norm(features[:, None] / scale - real[None] / scale, axis=-1)
    return -np.sort(distances, axis=1)[:, :nearest].mean(axis=1)


@torch.no_grad()
def real_clips(cache: LatentCache, autoencoder: Autoencoder, phase: Phase) -> Tensor:
    """Return test clips passed through the autoencoder, (M, T, 3, H, W) in 0..255.

    Generated clips come out of the decoder, so real ones must, too. Raises UserError for too few test clips.
    """
    rows = cache.rows(phase, "test").where(pl.col("clip_id").is_first_distinct())
    if len(rows) < NEAREST:
        raise UserError(f"{cache.folder}: {len(rows)} test clips are too few to judge by; raise 'validation_samples'")
    clips = []
    for row in rows:
        moments = cache.read(row).moments[None, : phase.frames]
        clips.append((autoencoder.decode(posterior_mean(moments)) / 2 + 0.5).clamp(0, 1)[0] * 255)
    return torch.stack(clips)


def quality_scores(samples: Path, models: Sequence[str], prompts: Sequence[str], real: Tensor, device: str) -> Scores:
    """Return scores by (model, prompt id): nearness to real clips in TransNetV2's features."""
    extractor = load_extractor(TRANSNETV2, None, None, device)
    protocol = EvalProtocol(RATER, "test clips", TRANSNETV2, (), (), frames=real.shape[1])
    truth = _features(extractor, protocol, real)
    found: dict[tuple[str, str], float] = {}
    for model in models:
        clips = torch.stack([_pixels(samples / model / f"{key}.mp4") for key in prompts])
        scores = nearness(_features(extractor, protocol, clips), truth)
        found |= {(model, key): float(score) for key, score in zip(prompts, scores, strict=True)}
    return found


def _pixels(path: Path) -> Tensor:
    """Read a clip, (T, 3, H, W) in 0..255."""
    return torch.from_numpy(read_frames(path)[0]).permute(0, 3, 1, 2).float()


def _features(extractor: Extractor, protocol: EvalProtocol, clips: Tensor) -> NDArray[np.float64]:
    parts = [extractor.features(protocol, part) for part in clips.split(16)]
    return np.concatenate(parts).astype(np.float64)


def prompt_scores(samples: Path, models: Sequence[str], prompts: Mapping[str, str], encoders: Encoders) -> Scores:
    """Return scores by (model, prompt id): the mean cosine of the CLIP embeddings of frames and prompt."""
    device = encoders.text.positional_embedding.device
    texts = dict(zip(prompts, encoders.text_features(list(prompts.values())), strict=True))
    found = {}
    for model in models:
        for key in prompts:
            frames = from_uint8(read_frames(samples / model / f"{key}.mp4")[0]).to(device)
            found[model, key] = float((encoders.image_features(frames) @ texts[key]).mean())
    return found


def cast_votes(
    models: Sequence[str], prompts: Sequence[str], scores: Mapping[str, Scores], votes: int, seed: int
) -> list[Vote]:
    """Answer the questions of a study by the scores of each question.

    With equal scores the left clip wins; sides are random. Copies of a question get the same answer.
    """
    found = []
    for question in schedule(models, prompts, votes=votes, seed=seed, check_every=0):
        values = scores[question.axis]
        left_won = values[question.left, question.prompt] >= values[question.right, question.prompt]
        pair = (question.left, question.right) if left_won else (question.right, question.left)
        found.append(Vote(question.prompt, *pair, left_won, RATER, question.axis))
    return found


def scores_table(scores: Mapping[str, Scores]) -> pl.DataFrame:
    """Return one row per question, model and prompt."""
    rows = [
        {"question": axis, "model": model, "prompt": prompt, "score": round(value, 5), "judge": RATER}
        for axis, values in sorted(scores.items())
        for (model, prompt), value in sorted(values.items())
    ]
    return pl.DataFrame(rows)
