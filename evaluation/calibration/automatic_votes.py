"""Automatic votes of the threshold calibration, for tests and for presets that nobody looks at.

They are a stand-in and never human votes: every row says `automatic`. Prompt following: the mean CLIP similarity of a
clip's frames with the prompt decides. Visual quality: the clip whose TransNetV2 features are nearer to those of real
test clips decides (mean Euclidean distance to the 3 nearest, features scaled by their spread over the real clips). Both
rules see the networks' blind spots and nothing else; neither has been compared with people.
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
    """(N,) minus the mean distance of features (N, d) to the `nearest` of the real ones (M, d); higher is closer.

    Each dimension is divided by its standard deviation over the real clips; constant ones count as they are.
    """
    spread = real.std(axis=0)
    scale = np.where(spread > 1e-6, spread, 1.0)
    distances = np.linalg.norm(features[:, None] / scale - real[None] / scale, axis=-1)
    return -np.sort(distances, axis=1)[:, :nearest].mean(axis=1)


@torch.no_grad()
def real_clips(cache: LatentCache, autoencoder: Autoencoder, phase: Phase) -> Tensor:
    """(M, T, 3, H, W) in 0..255: test clips through the autoencoder, as everything that the models make goes."""
    rows = cache.rows(phase, "test").unique("clip_id", keep="first", maintain_order=True)
    if len(rows) < NEAREST:
        raise UserError(f"{cache.folder}: {len(rows)} test clips are too few to judge by; raise 'validation_samples'")
    clips = []
    for row in rows.to_dicts():
        moments = cache.read(row).moments[None, : phase.frames]
        clips.append((autoencoder.decode(posterior_mean(moments)) / 2 + 0.5).clamp(0, 1)[0] * 255)
    return torch.stack(clips)


def quality_scores(samples: Path, models: Sequence[str], prompts: Sequence[str], real: Tensor, device: str) -> Scores:
    """Score by (model, prompt id): nearness to real clips in TransNetV2's features."""
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
    """(T, 3, H, W) in 0..255."""
    return torch.from_numpy(read_frames(path)[0]).permute(0, 3, 1, 2).float()


def _features(extractor: Extractor, protocol: EvalProtocol, clips: Tensor) -> NDArray[np.float64]:
    parts = [extractor.features(protocol, part) for part in clips.split(16)]
    return np.concatenate(parts).astype(np.float64)


def prompt_scores(samples: Path, models: Sequence[str], prompts: Mapping[str, str], encoders: Encoders) -> Scores:
    """Score by (model, prompt id): the mean cosine of the frames' and the prompt's CLIP embeddings."""
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
    """The answers to a study's questions by the scores of each question's axis; equal scores: the left clip wins, and
    sides are random. Copies of a question get the same answer.
    """
    found = []
    for question in schedule(models, prompts, votes=votes, seed=seed, check_every=0):
        values = scores[question.axis]
        left_won = values[question.left, question.prompt] >= values[question.right, question.prompt]
        pair = (question.left, question.right) if left_won else (question.right, question.left)
        found.append(Vote(question.prompt, *pair, left_won, RATER, question.axis))
    return found


def scores_table(scores: Mapping[str, Scores]) -> pl.DataFrame:
    """One row a question, model and prompt."""
    rows = [
        {"question": axis, "model": model, "prompt": prompt, "score": round(value, 5), "judge": RATER}
        for axis, values in sorted(scores.items())
        for (model, prompt), value in sorted(values.items())
    ]
    return pl.DataFrame(rows)
